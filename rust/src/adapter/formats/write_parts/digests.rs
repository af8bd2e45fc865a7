//! Digests of a file that its own header holds, as kohya's scripts compute them.
//!
//! `sshs_model_hash` is the SHA-256 of all bytes behind the header, `modelspec.hash_sha256` the same
//! with `0x` before it. `sshs_legacy_hash` is the beginning of that of 64 KiB of the file, from 1 MiB
//! on, as the file would be with no other metadata than the training's (`ss_…`).

use std::ops::Range;

use indexmap::IndexMap;
use sha2::{Digest, Sha256};

use crate::storage::digest::hexadecimal;
use crate::tensor::safetensors::write::Afterwards;
use crate::tensor::safetensors::{Header, Tensor};

/// The keys of metadata.
const MODEL: &str = "sshs_model_hash";
const LEGACY: &str = "sshs_legacy_hash";
const MODEL_SPEC: &str = "modelspec.hash_sha256";
/// The same with the number of characters of each.
const DIGESTS: [(&str, usize); 3] = [(MODEL, 64), (LEGACY, 8), (MODEL_SPEC, 66)];
/// What both of kohya's own are of.
pub(super) const OF_KOHYA: [&str; 2] = [MODEL, LEGACY];
/// What the metadata of a training begins with.
const TRAINING: &str = "ss_";
/// What of a file the shorter digest is of.
const SAMPLE: Range<u64> = 0x10_0000..0x11_0000;

/// Whether an entry of a file's metadata is a digest of the file.
pub fn is_digest(key: &str) -> bool {
    DIGESTS.iter().any(|(name, _)| *name == key)
}

/// The types of elements in the order in which the safetensors library writes them; tensors of one
/// type are in the order of their names.
const ORDER: [&str; 11] =
    ["U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"];

/// Brings tensors into the order in which the library writes them, which kohya's digests are of.
pub(super) fn sort(tensors: &mut [(String, Tensor)]) {
    let place = |tensor: &Tensor| ORDER.iter().position(|name| *name == tensor.dtype.name());
    tensors.sort_by(|(one, x), (other, y)| {
        let places = (place(x).unwrap_or(ORDER.len()), place(y).unwrap_or(ORDER.len()));
        places.0.cmp(&places.1).then_with(|| one.cmp(other))
    });
}

/// The digests of a file that is being written.
pub(super) struct Digests {
    names: Vec<&'static str>,
    all: Sha256,
    sample: Sha256,
    /// Where in the file of the shorter digest the next byte lies.
    position: u64,
}

impl Digests {
    /// Of those of these names that are digests.
    pub(super) fn of(names: &[&str]) -> Self {
        let asked = DIGESTS.iter().map(|(name, _)| *name).filter(|name| names.contains(name));
        Self { names: asked.collect(), all: Sha256::new(), sample: Sha256::new(), position: 0 }
    }

    /// What stands in their place until they are known, of the same length.
    pub(super) fn placeholders(&self) -> impl Iterator<Item = (String, String)> {
        let known = DIGESTS.iter().filter(|(name, _)| self.names.contains(name));
        known.map(|(name, length)| ((*name).to_owned(), "0".repeat(*length)))
    }

    fn take(&mut self, bytes: &[u8]) {
        let end = self.position + bytes.len() as u64;
        let (from, to) = (SAMPLE.start.max(self.position), SAMPLE.end.min(end));
        if from < to {
            let own = (from - self.position) as usize..(to - self.position) as usize;
            self.sample.update(&bytes[own]);
        }
        self.position = end;
    }
}

impl Afterwards for Digests {
    fn begin(&mut self, header: &Header) {
        let own = header.metadata.iter().filter(|(key, _)| key.starts_with(TRAINING));
        let metadata = own.map(|(key, value)| (key.clone(), value.clone())).collect();
        self.take(&encoded(Header { metadata, tensors: header.tensors.clone() }));
    }

    fn update(&mut self, bytes: &[u8]) {
        self.all.update(bytes);
        self.take(bytes);
    }

    fn finish(self: Box<Self>, metadata: &mut IndexMap<String, String>) {
        let all = hexadecimal(&self.all.finalize());
        let sample = hexadecimal(&self.sample.finalize());
        for name in self.names {
            let digest = match name {
                LEGACY => sample[..8].to_owned(),
                MODEL_SPEC => format!("0x{all}"),
                _ => all.clone(),
            };
            metadata.insert(name.to_owned(), digest);
        }
    }
}

/// A header as the library writes it, which has an entry for metadata even where there is none.
fn encoded(header: Header) -> Vec<u8> {
    const PREFIX: usize = 8;
    let plain = header.encode();
    if !header.metadata.is_empty() {
        return plain;
    }
    let entries = &plain[PREFIX + 1..];
    let mut text = b"{\"__metadata__\":{}".to_vec();
    if !header.tensors.is_empty() {
        text.push(b',');
    }
    text.extend(entries.trim_ascii_end());
    text.resize(text.len().next_multiple_of(PREFIX), b' ');
    let mut encoded = (text.len() as u64).to_le_bytes().to_vec();
    encoded.append(&mut text);
    encoded
}
