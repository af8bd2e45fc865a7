//! SHA-256 of files and bytes, and of two contents at once.
//!
//! The processor's instructions for it wait for one another: within one content each needs what
//! the one before has found, and half of the time passes in waiting. Two contents have nothing to
//! do with each other, so that one fills the other's pauses, and both take the time of one.

use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// The SHA-256 of a file, in hexadecimal.
///
/// # Errors
/// [`Error::Io`] if it cannot be read.
pub fn sha256_of(path: &Path) -> Result<String> {
    let failed = |error| Error::io(path, error);
    let mut file = std::fs::File::open(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => break,
            length => hasher.update(&buffer[..length]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The SHA-256 of some bytes, in hexadecimal.
pub fn sha256_of_bytes(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// Bytes in hexadecimal.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The digests of two contents, in that order.
pub(crate) fn sha256_of_both(first: &[u8], second: &[u8]) -> [[u8; 32]; 2] {
    #[cfg(target_arch = "x86_64")]
    if x86::is_available() {
        // SAFETY: the processor has every feature that it enables.
        return unsafe { x86::sha256_of_both(first, second) };
    }
    [first, second].map(|content| Sha256::digest(content).into())
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_extract_epi32, _mm_loadu_si128, _mm_set_epi32,
        _mm_set_epi64x, _mm_setzero_si128, _mm_sha256msg1_epu32, _mm_sha256msg2_epu32,
        _mm_sha256rnds2_epu32, _mm_shuffle_epi8, _mm_shuffle_epi32,
    };

    /// What one step of the compression takes in.
    type Block = [u8; 64];

    /// The fractional parts of the square roots of the first eight primes (FIPS 180-4, 5.3.3).
    const START: [u32; 8] = [
        0x6a09_e667,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ];

    /// Those of the cube roots of the first 64 (FIPS 180-4, 4.2.2), four to a vector.
    #[rustfmt::skip]
    static ROUNDS: [[u32; 4]; 16] = [
        [0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5],
        [0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5],
        [0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3],
        [0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174],
        [0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc],
        [0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da],
        [0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7],
        [0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967],
        [0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13],
        [0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85],
        [0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3],
        [0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070],
        [0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5],
        [0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3],
        [0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208],
        [0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2],
    ];

    pub(super) fn is_available() -> bool {
        is_x86_feature_detected!("sha")
            && is_x86_feature_detected!("sse4.1")
            && is_x86_feature_detected!("ssse3")
    }

    /// The eight words a to h as the instructions want them.
    #[derive(Clone, Copy)]
    struct State {
        abef: __m128i,
        cdgh: __m128i,
    }

    #[target_feature(enable = "sha,sse4.1,ssse3")]
    pub(super) fn sha256_of_both(first: &[u8], second: &[u8]) -> [[u8; 32]; 2] {
        let contents = [first, second];
        let blocks = contents.map(|content| content.as_chunks::<64>().0);
        let common = blocks[0].len().min(blocks[1].len());
        let mut states = [start(); 2];
        compress(&mut states, blocks.map(|blocks| &blocks[..common]));
        let mut digests = [[0; 32]; 2];
        for (place, digest) in digests.iter_mut().enumerate() {
            let mut own = [states[place]];
            compress(&mut own, [&blocks[place][common..]]);
            let (padding, count) = padding(contents[place]);
            compress(&mut own, [&padding[..count]]);
            *digest = bytes(own[0]);
        }
        digests
    }

    /// The last bytes of a content, a one, zeros, and its length in bits; how many blocks it takes.
    fn padding(content: &[u8]) -> ([Block; 2], usize) {
        let rest = content.as_chunks::<64>().1;
        let mut padding = [[0; 64]; 2];
        let bytes = padding.as_flattened_mut();
        bytes[..rest.len()].copy_from_slice(rest);
        bytes[rest.len()] = 0x80;
        let count = if rest.len() < 56 { 1 } else { 2 };
        let bits = content.len() as u64 * 8;
        bytes[64 * count - 8..64 * count].copy_from_slice(&bits.to_be_bytes());
        (padding, count)
    }

    #[target_feature(enable = "sse4.1")]
    fn start() -> State {
        let [a, b, c, d, e, f, g, h] = START.map(u32::cast_signed);
        State { abef: _mm_set_epi32(a, b, e, f), cdgh: _mm_set_epi32(c, d, g, h) }
    }

    #[target_feature(enable = "sse4.1")]
    fn bytes(state: State) -> [u8; 32] {
        let State { abef, cdgh } = state;
        let words = [
            _mm_extract_epi32::<3>(abef),
            _mm_extract_epi32::<2>(abef),
            _mm_extract_epi32::<3>(cdgh),
            _mm_extract_epi32::<2>(cdgh),
            _mm_extract_epi32::<1>(abef),
            _mm_extract_epi32::<0>(abef),
            _mm_extract_epi32::<1>(cdgh),
            _mm_extract_epi32::<0>(cdgh),
        ];
        let mut bytes = [0; 32];
        for (target, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *target = word.to_be_bytes();
        }
        bytes
    }

    /// Takes blocks into states, each into its own; there are as many of each.
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn compress<const N: usize>(states: &mut [State; N], blocks: [&[Block]; N]) {
        // Words are big-endian.
        let order = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
        for index in 0..blocks[0].len() {
            let before = *states;
            let mut words = [[_mm_setzero_si128(); 4]; N];
            for (own, blocks) in words.iter_mut().zip(blocks) {
                for (target, source) in own.iter_mut().zip(blocks[index].as_chunks::<16>().0) {
                    // SAFETY: the array is a vector's size; it does not have to be aligned.
                    let loaded = unsafe { _mm_loadu_si128(source.as_ptr().cast::<__m128i>()) };
                    *target = _mm_shuffle_epi8(loaded, order);
                }
            }
            let (first, others) = ROUNDS.split_at(4);
            for (place, constants) in first.iter().enumerate() {
                rounds(states, &words, place, constants);
            }
            for constants in others.as_chunks::<4>().0 {
                extend::<0, N>(&mut words);
                rounds(states, &words, 0, &constants[0]);
                extend::<1, N>(&mut words);
                rounds(states, &words, 1, &constants[1]);
                extend::<2, N>(&mut words);
                rounds(states, &words, 2, &constants[2]);
                extend::<3, N>(&mut words);
                rounds(states, &words, 3, &constants[3]);
            }
            for (state, before) in states.iter_mut().zip(before) {
                state.abef = _mm_add_epi32(state.abef, before.abef);
                state.cdgh = _mm_add_epi32(state.cdgh, before.cdgh);
            }
        }
    }

    /// Puts the next four words of the message schedule in the place of the oldest.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn extend<const PLACE: usize, const N: usize>(words: &mut [[__m128i; 4]; N]) {
        for own in words {
            let [a, b, c, d] = std::array::from_fn(|index| own[(PLACE + index) % 4]);
            let sum = _mm_add_epi32(_mm_sha256msg1_epu32(a, b), _mm_alignr_epi8::<4>(d, c));
            own[PLACE] = _mm_sha256msg2_epu32(sum, d);
        }
    }

    /// Four rounds with the words at one place.
    #[inline]
    #[target_feature(enable = "sha,sse4.1,ssse3")]
    fn rounds<const N: usize>(
        states: &mut [State; N],
        words: &[[__m128i; 4]; N],
        place: usize,
        constants: &[u32; 4],
    ) {
        // SAFETY: the array is a vector's size; it does not have to be aligned.
        let constants = unsafe { _mm_loadu_si128(constants.as_ptr().cast::<__m128i>()) };
        for (State { abef, cdgh }, words) in states.iter_mut().zip(words) {
            let sum = _mm_add_epi32(words[place], constants);
            *cdgh = _mm_sha256rnds2_epu32(*cdgh, *abef, sum);
            *abef = _mm_sha256rnds2_epu32(*abef, *cdgh, _mm_shuffle_epi32::<0b1110>(sum));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_digests_are_those_of_each_content_alone() {
        let bytes: Vec<u8> = (0..5000u32).map(|index| ((index * index) >> 3) as u8).collect();
        // Around the lengths at which the padding takes another block, and of very unlike lengths.
        let lengths = [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1000, 4096, 4999];
        for first in lengths {
            for second in lengths {
                let contents = [&bytes[..first], &bytes[1..=second]];
                let found = sha256_of_both(contents[0], contents[1]);
                let expected: [[u8; 32]; 2] = contents.map(|c| Sha256::digest(c).into());
                assert_eq!(found, expected, "{first} and {second} bytes");
            }
        }
    }

    #[test]
    fn the_digest_of_abc_is_the_published_one() {
        let published = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        for digest in sha256_of_both(b"abc", b"abc") {
            assert_eq!(hexadecimal(&digest), published);
        }
    }
}
