//! Digests of files and bytes, in hexadecimal: SHA-256, which others compare (reports, the hub), and
//! BLAKE3, which is found at more than twice the speed, for what tells a fleet's files apart.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::storage::source::Source;

/// The SHA-256 of a file.
///
/// # Errors
/// [`Error::Io`] if it cannot be read.
pub fn sha256_of(path: &Path) -> Result<String> {
    let failed = |error| Error::io(path, error);
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => break,
            length => hasher.update(&buffer[..length]),
        }
    }
    Ok(hexadecimal(&hasher.finalize()))
}

/// The SHA-256 of all that can be read of a source.
///
/// # Errors
/// Those of reading.
pub(crate) fn sha256_of_source(source: &dyn Source) -> io::Result<String> {
    let length = source.stamp().length;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    for start in (0..length).step_by(buffer.len()) {
        let part = &mut buffer[..(length - start).min(1 << 18) as usize];
        source.read_at(part, start)?;
        hasher.update(part);
    }
    Ok(hexadecimal(&hasher.finalize()))
}

/// The SHA-256 of some bytes.
pub fn sha256_of_bytes(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// The BLAKE3 of some bytes.
pub fn blake3_of_bytes(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// The BLAKE3 of a file.
///
/// # Errors
/// [`Error::Io`] if it cannot be read.
pub fn blake3_of(path: &Path) -> Result<String> {
    let failed = |error| Error::io(path, error);
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).map_err(failed)?).map_err(failed)?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Bytes in hexadecimal.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_the_published_ones() {
        let published = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(blake3_of_bytes(b""), published);
        let file = tempfile::NamedTempFile::new().expect("a file");
        assert_eq!(blake3_of(file.path()).expect("read"), published);
        std::fs::write(file.path(), "abc").expect("written");
        let published = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_of_bytes(b"abc"), published);
        assert_eq!(sha256_of(file.path()).expect("read"), published);
    }
}
