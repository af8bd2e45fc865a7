//! Which files of a store make up a model, and the index that says so.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use indexmap::IndexMap;
use serde_json::Value;

use super::{Location, Shard, read_object};
use crate::error::{Error, Owner, Result, agree, counted};
use crate::storage::file_names::{ADAPTER_FILES, holds_weights, shard_of};
use crate::storage::identify;
use crate::storage::store::Store;

/// The file names under which libraries save a whole model, in the order in which transformers
/// looks for them; diffusers' come after.
const SINGLE_FILES: [&str; 2] = ["model.safetensors", "diffusion_pytorch_model.safetensors"];
const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// The index file that maps tensors to shards.
#[derive(Debug, Clone)]
pub struct Index {
    /// Its name in the checkpoint's directory.
    pub file_name: String,
    /// Its whole content.
    pub content: serde_json::Map<String, Value>,
    /// The same as it stands in the file.
    pub bytes: Vec<u8>,
}

/// The files of a model: its shards, and the index where there is one.
pub(super) struct Files {
    pub shards: Vec<String>,
    pub index: Option<Index>,
}

/// Decides which files of a store make up the model.
pub(super) fn find_files(store: &dyn Store) -> Result<Files> {
    let mut names = store.list()?;
    names.sort();
    let has = |name: &str| names.iter().any(|other| other == name);
    let single = |name: &str| Files { shards: vec![name.to_owned()], index: None };
    for name in SINGLE_FILES {
        if has(name) {
            return Ok(single(name));
        }
        let index = name.replace(".safetensors", INDEX_SUFFIX);
        if has(&index) {
            return read_index(store, &index);
        }
    }
    let refuse = |message: String| Err(Error::checkpoint(store.root(), message));
    if ADAPTER_FILES.iter().any(|name| has(name)) {
        return refuse("is an adapter, not a base model; give it as an adapter".into());
    }
    if has("model_index.json") {
        return refuse(
            "is a diffusers pipeline; give the component that the adapter was trained on, \
             such as its transformer/ or unet/ directory"
                .into(),
        );
    }
    // Variants such as model.safetensors.index.fp16.json and files under names of their own.
    let is_index = |name: &&String| name.contains(".safetensors.index") && name.ends_with(".json");
    let indexes: Vec<_> = names.iter().filter(is_index).collect();
    let weights: Vec<_> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
    match (indexes.as_slice(), weights.as_slice()) {
        ([index], _) => read_index(store, index),
        ([], [name]) => match shard_of(name) {
            Some((_, _, count)) if count > 1 => refuse(format!(
                "holds {name}, one shard of {count}, and no index; fetch the others and the index"
            )),
            _ => Ok(single(name)),
        },
        ([], []) => refuse(of_no_weights(store, &names)),
        ([], several) => refuse(format!(
            "holds {} .safetensors files but no index that says which belong together: {}; \
             give one of the files, or add model.safetensors.index.json",
            several.len(),
            several.iter().take(4).map(|name| name.as_str()).collect::<Vec<_>>().join(", ")
        )),
        (several, _) => refuse(format!(
            "holds {} index files and none of the usual name: {}",
            several.len(),
            several.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ")
        )),
    }
}

/// What a directory without safetensors files is, and what to do.
fn of_no_weights(store: &dyn Store, names: &[String]) -> String {
    let (weights, others): (Vec<_>, Vec<_>) =
        names.iter().filter(|name| holds_weights(name)).partition(|name| {
            [".bin", ".pt", ".pth", ".ckpt"].iter().any(|ending| name.ends_with(ending))
        });
    if let [first, ..] = weights.as_slice() {
        // A pointer, a page or an archive under the name of a pickle.
        let found = identify::of_file(store, first).filter(|found| !found.is_pickle());
        return match found {
            Some(found) => {
                format!("is no model that can be read: {first} is {}; {}", found.what, found.advice)
            }
            None => format!(
                "holds its weights as {} files ({first}); save it with safe_serialization first \
                 (load and save_pretrained in transformers)",
                &first[first.rfind('.').unwrap_or(0)..]
            ),
        };
    }
    if let Some(found) = identify::of_folder(store, Owner::Checkpoint) {
        return found.sentence();
    }
    let others: Vec<_> = others.into_iter().take(4).map(String::as_str).collect();
    if !others.is_empty() {
        return format!(
            "holds its weights in a form that cannot be read ({}); give them as safetensors files",
            others.join(", ")
        );
    }
    "holds no model: neither model.safetensors nor model.safetensors.index.json nor another \
     .safetensors file"
        .to_owned()
}

fn read_index(store: &dyn Store, name: &str) -> Result<Files> {
    let path = store.path(name);
    let (content, bytes) = read_object(store, name)?;
    let broken = |message: String| Error::checkpoint(&path, message);
    let map = content
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| broken("has no weight_map object; it is no safetensors index".into()))?;
    let mut shards: Vec<String> = Vec::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().ok_or_else(|| {
            broken(format!("maps tensor {tensor} to something that is no file name"))
        })?;
        if shards.iter().any(|known| known == shard) {
            continue;
        }
        let inside = Path::new(shard).components().all(|part| matches!(part, Component::Normal(_)));
        if !inside || shard.is_empty() {
            return Err(broken(format!("names the shard {shard:?}, which leaves its directory")));
        }
        if !store.has(shard)? {
            return Err(broken(format!(
                "names the shard {shard}, which is not there; fetch the checkpoint again"
            )));
        }
        shards.push(shard.to_owned());
    }
    if shards.is_empty() {
        return Err(broken("has an empty weight_map".into()));
    }
    shards.sort();
    check_count(store, &shards)?.map_or(Ok(()), |message| Err(broken(message)))?;
    Ok(Files { shards, index: Some(Index { file_name: name.to_owned(), content, bytes }) })
}

/// What is wrong with an index that names some shards, of whose names tell that there are more, while
/// the others are not there. A shard without tensors is in no index, but it is there.
fn check_count(store: &dyn Store, shards: &[String]) -> Result<Option<String>> {
    let mut families = BTreeMap::<(&str, u64, usize), BTreeSet<u64>>::new();
    for name in shards {
        if let Some((stem, number, count)) = shard_of(name) {
            let width =
                name.len() - ".safetensors".len() - name.rfind("-of-").map_or(0, |at| at + 4);
            families.entry((stem, count, width)).or_default().insert(number);
        }
    }
    for ((stem, count, width), numbers) in families {
        for number in (1..=count).filter(|number| !numbers.contains(number)) {
            let name = format!("{stem}-{number:0width$}-of-{count:0width$}.safetensors");
            if !store.has(&name)? {
                return Ok(Some(format!(
                    "names {} of the {count} shards of {stem}, and {name} is not there; fetch the \
                     checkpoint again",
                    numbers.len()
                )));
            }
        }
    }
    Ok(None)
}

/// Holds the index against the shards. A tensor in the wrong shard is an error, because loaders
/// would miss it; one that the index does not list is only odd.
pub(super) fn check_index(
    path: &Path,
    index: &Index,
    shards: &[Shard],
    tensors: &IndexMap<String, Location>,
) -> Result<Vec<String>> {
    let map = index.content["weight_map"].as_object().expect("checked when it was read");
    for (tensor, shard) in map {
        let shard = shard.as_str().expect("checked when it was read");
        match tensors.get(tensor) {
            None => {
                return Err(Error::checkpoint(
                    path,
                    format!("places tensor {tensor} in {shard}, which does not hold it"),
                ));
            }
            Some(location) if shards[location.shard].name != shard => {
                let actual = &shards[location.shard].name;
                return Err(Error::checkpoint(
                    path,
                    format!("places tensor {tensor} in {shard}, but it stands in {actual}"),
                ));
            }
            Some(_) => {}
        }
    }
    let unlisted: Vec<_> = tensors.keys().filter(|name| !map.contains_key(*name)).collect();
    Ok(match unlisted.as_slice() {
        [] => Vec::new(),
        [first, ..] => vec![format!(
            "{}: {} {} in the shards but not in the index (the first: {first}); {} carried over \
             and listed in the output's index",
            path.display(),
            counted(unlisted.len(), "tensor"),
            agree(unlisted.len(), "stands", "stand"),
            agree(unlisted.len(), "it is", "they are"),
        )],
    })
}
