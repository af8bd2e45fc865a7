//! The list of files that make up a written model: by it a copy is known to be whole, and a later
//! merge knows what of it may be replaced.

use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use crate::storage::local;
use crate::storage::store::Store;

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
    let content = local::read_small(&directory.join(MANIFEST));
    let files = content.map(|(content, _)| decode(&content)).unwrap_or_default();
    files.into_iter().filter(|(name, _)| super::stays_inside(directory, name)).collect()
}

/// Names and sizes in a manifest; none in what is no manifest of this layout.
fn decode(content: &[u8]) -> Vec<(String, u64)> {
    let manifest = serde_json::from_slice::<Manifest>(content).ok();
    let manifest = manifest.filter(|manifest| manifest.schema == SCHEMA);
    let files = manifest.map(|manifest| manifest.files).unwrap_or_default();
    files.into_iter().map(|entry| (entry.name, entry.bytes)).collect()
}

/// The files that a store's manifest lists and that are not there, as in a copy that was cut off.
pub fn missing_files(store: &dyn Store) -> Vec<String> {
    let content = store.read_small(MANIFEST).map(|(content, _)| content).unwrap_or_default();
    let is_inside = |name: &String| {
        Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
    };
    let is_missing = |name: &String| is_inside(name) && matches!(store.has(name), Ok(false));
    decode(&content).into_iter().map(|(name, _)| name).filter(is_missing).collect()
}
