//! The list of files that make up a written model: by it a copy is known to be whole, and a later
//! merge knows what of it may be replaced.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::storage::local;

/// The manifest's name, beside the model.
pub const MANIFEST: &str = "lorafast_manifest.json";
/// The version of its layout.
const SCHEMA: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    schema: u32,
    lorafast: String,
    files: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    name: String,
    bytes: u64,
}

/// The manifest of files with these names and sizes.
pub fn encode<'a>(files: impl Iterator<Item = (&'a str, u64)>) -> Vec<u8> {
    let mut files: Vec<_> =
        files.map(|(name, bytes)| Entry { name: name.to_owned(), bytes }).collect();
    files.sort_by(|left, right| left.name.cmp(&right.name));
    let lorafast = env!("CARGO_PKG_VERSION").to_owned();
    let manifest = Manifest { schema: SCHEMA, lorafast, files };
    let mut text = serde_json::to_string_pretty(&manifest).expect("names and numbers serialise");
    text.push('\n');
    text.into_bytes()
}

/// The files that a directory's manifest lists, none where it has no manifest that can be read.
pub fn listed(directory: &Path) -> Vec<(String, u64)> {
    let read = || {
        let (mut file, _) = local::open(&directory.join(MANIFEST)).ok()?;
        let manifest: Manifest =
            serde_json::from_slice(&local::read_whole(&mut file).ok()?).ok()?;
        (manifest.schema == SCHEMA).then_some(manifest.files)
    };
    let files = read().unwrap_or_default().into_iter();
    files
        .filter(|entry| super::stays_inside(directory, &entry.name))
        .map(|entry| (entry.name, entry.bytes))
        .collect()
}

/// The files that a directory's manifest lists and that are not there, as in a copy that was cut
/// off.
pub fn missing_files(directory: &Path) -> Vec<String> {
    let is_missing = |name: &String| matches!(local::find(&directory.join(name)), Ok(None));
    listed(directory).into_iter().map(|(name, _)| name).filter(is_missing).collect()
}
