//! What lies beside a model's weights and belongs to the model: config, tokenizer, generation
//! config, chat template, code, licence, cards.

use std::fs;
use std::path::{Path, PathBuf};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

/// The files of a checkpoint's directory beside its own shards and index.
#[derive(Debug, Default, Clone)]
pub struct SideFiles {
    /// Carried over, by their path within the directory, with their size.
    pub carried: Vec<(String, u64)>,
    /// Not carried over: other copies of the weights, which the merge does not change and which
    /// would stand beside the merged ones as if they were the same model.
    pub left_out: Vec<String>,
}

/// Endings of files that hold weights in whatever format.
const WEIGHTS: [&str; 13] = [
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".msgpack",
    ".h5",
    ".ot",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".tflite",
];
/// Folders of other copies of the weights, and of tools' own data.
const LEFT_OUT: [&str; 9] =
    [".git", ".cache", ".huggingface", "original", "onnx", "openvino", "coreml", "metal", "flax"];
/// Files that describe the directory they lie in, not the model.
const OWN: [&str; 7] = [
    ".gitattributes",
    ".gitignore",
    "merge_report.json",
    "merge_report.md",
    "merge_info.json",
    "subtract_report.json",
    "subtract_report.md",
];

/// Lists the side files of a checkpoint. A single file has none.
///
/// # Errors
/// [`Error::Io`] if the directory cannot be read.
pub fn list(base: &Checkpoint) -> Result<SideFiles> {
    let mut files = SideFiles::default();
    if base.is_directory() {
        let mut own: Vec<&str> = base.shards().iter().map(|shard| shard.name.as_str()).collect();
        own.extend(base.index().map(|index| index.file_name.as_str()));
        walk(base.root(), Path::new(""), &own, &mut files)?;
        files.carried.sort();
        files.left_out.sort();
    }
    Ok(files)
}

fn walk(root: &Path, below: &Path, own: &[&str], files: &mut SideFiles) -> Result<()> {
    let directory = root.join(below);
    let failed = |error| Error::io(&directory, error);
    for entry in fs::read_dir(&directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let file_name = entry.file_name().to_string_lossy().into_owned();
        let relative: PathBuf = below.join(&file_name);
        let name = relative.to_string_lossy().into_owned();
        if own.contains(&name.as_str()) || OWN.contains(&file_name.as_str()) {
            continue;
        }
        // Follows links: a hub's snapshot is made of them.
        let Ok(metadata) = fs::metadata(entry.path()) else {
            continue;
        };
        if metadata.is_dir() {
            if LEFT_OUT.contains(&file_name.as_str()) || file_name == crate::writer::STAGING {
                if !file_name.starts_with('.') {
                    files.left_out.push(format!("{name}/"));
                }
            // A link to a folder above would never end.
            } else if !entry.path().is_symlink() {
                walk(root, &relative, own, files)?;
            }
            continue;
        }
        let lower = file_name.to_lowercase();
        let is_index = lower.contains(".index") && lower.ends_with(".json");
        // Below the top, safetensors files belong to other parts of the model (a pipeline's
        // component, a sentence model's dense layer), not to other copies of these weights.
        let is_part = below.components().next().is_some() && lower.ends_with(".safetensors");
        if !is_part && (is_index || WEIGHTS.iter().any(|ending| lower.ends_with(ending))) {
            files.left_out.push(name);
        } else {
            files.carried.push((name, metadata.len()));
        }
    }
    Ok(())
}
