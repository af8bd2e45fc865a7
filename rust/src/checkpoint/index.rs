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
const SINGLE_FILES: [&str; 2] = ["model.safetensors", DIFFUSERS_FILE];
/// That of diffusers' models.
const DIFFUSERS_FILE: &str = "diffusion_pytorch_model.safetensors";
const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// The index file that maps tensors to shards.
#[derive(Debug, Clone)]
pub struct Index {
    /// Its name in the checkpoint's directory.
    pub file_name: String,
    /// The folder that it lies in, with a slash at the end, and counts the names of shards from;
    /// empty, where that is the checkpoint's directory.
    pub folder: String,
    /// What the names of its tensors begin with in the checkpoint, and not in it.
    pub prefix: String,
    /// Its whole content.
    pub content: serde_json::Map<String, Value>,
    /// The same as it stands in the file.
    pub bytes: Vec<u8>,
}

/// A shard that belongs to a model.
pub(super) struct ShardFile {
    /// Its name in the checkpoint's directory.
    pub name: String,
    /// What the names of its tensors begin with in the checkpoint, and not in the file.
    pub prefix: String,
}

/// The files of a model: its shards, and its indexes: of a pipeline one for each component that has
/// one, else at most one.
#[derive(Default)]
pub(super) struct Files {
    pub shards: Vec<ShardFile>,
    pub indexes: Vec<Index>,
}

impl Files {
    /// One file, whose tensors keep their names.
    pub fn single(name: &str) -> Self {
        let shard = ShardFile { name: name.to_owned(), prefix: String::new() };
        Self { shards: vec![shard], indexes: Vec::new() }
    }

    /// Adds those of a component, which were found from its folder.
    pub fn add(&mut self, found: Self, folder: &str) {
        let prefix = format!("{folder}.");
        let within = |name: &str| format!("{folder}/{name}");
        self.shards.extend(
            found
                .shards
                .into_iter()
                .map(|shard| ShardFile { name: within(&shard.name), prefix: prefix.clone() }),
        );
        self.indexes.extend(found.indexes.into_iter().map(|index| Index {
            file_name: within(&index.file_name),
            folder: format!("{folder}/"),
            prefix: prefix.clone(),
            ..index
        }));
    }
}

/// The variant that the name of a file of weights tells: `fp16` of `model.fp16.safetensors`.
pub(super) fn variant_of(name: &str) -> Option<&str> {
    let stems = SINGLE_FILES.iter().filter_map(|name| name.strip_suffix(".safetensors"));
    let rest = stems.filter_map(|stem| name.strip_prefix(stem)).next()?;
    let rest = rest.strip_suffix(".safetensors")?;
    let rest = rest
        .rsplit_once("-of-")
        .map_or(rest, |(shard, rest)| rest.split_once('.').map_or(shard, |(_, variant)| variant));
    let variant = rest.trim_start_matches('.').split('-').next().unwrap_or_default();
    Some(variant).filter(|variant| !variant.is_empty())
}

/// Decides which files of a store make up the model.
pub(super) fn find_files(store: &dyn Store) -> Result<Files> {
    find_files_of(store, "")
}

/// The same for a model that is saved by that library, whose usual names come first.
pub(super) fn find_files_of(store: &dyn Store, library: &str) -> Result<Files> {
    let mut names = store.list()?;
    names.sort();
    let has = |name: &str| names.iter().any(|other| other == name);
    let single = |name: &str| Files::single(name);
    let mut usual = SINGLE_FILES;
    if library == "diffusers" {
        usual.reverse();
    }
    for name in usual {
        let index = name.replace(".safetensors", INDEX_SUFFIX);
        // Where a model has been saved in both ways, transformers reads the one file, and diffusers
        // the shards.
        if has(name) && !(name == DIFFUSERS_FILE && has(&index)) {
            return Ok(single(name));
        }
        if has(&index) {
            return read_index(store, &index);
        }
    }
    let refuse = |message: String| Err(Error::checkpoint(store.root(), message));
    if ADAPTER_FILES.iter().any(|name| has(name)) {
        return refuse("is an adapter, not a base model; give it as an adapter".into());
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
        ([], several) if several.iter().all(|name| variant_of(name).is_some()) => refuse(format!(
            "holds several variants of its weights and no plain one ({}); give a directory with \
             one of them",
            several.iter().take(4).map(|name| name.as_str()).collect::<Vec<_>>().join(", ")
        )),
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
    let mut known = indexmap::IndexSet::<&str>::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().ok_or_else(|| {
            broken(format!("maps tensor {tensor} to something that is no file name"))
        })?;
        if !known.insert(shard) {
            continue;
        }
        let inside = Path::new(shard).components().all(|part| matches!(part, Component::Normal(_)));
        if !inside || shard.is_empty() {
            return Err(broken(format!("names the shard {shard:?}, which leaves its directory")));
        }
    }
    let mut shards: Vec<String> = known.into_iter().map(str::to_owned).collect();
    store.will_open(&shards);
    for shard in &shards {
        if !store.has(shard)? {
            return Err(broken(format!(
                "names the shard {shard}, which is not there; fetch the checkpoint again"
            )));
        }
    }
    if shards.is_empty() {
        return Err(broken("has an empty weight_map".into()));
    }
    shards.sort();
    check_count(store, &shards)?.map_or(Ok(()), |message| Err(broken(message)))?;
    let (file_name, folder, prefix) = (name.to_owned(), String::new(), String::new());
    let index = Index { file_name, folder, prefix, content, bytes };
    let shard = |name| ShardFile { name, prefix: String::new() };
    Ok(Files { shards: shards.into_iter().map(shard).collect(), indexes: vec![index] })
}

/// The shards that an index of an adapter's names.
///
/// # Errors
/// [`Error::Adapter`] if it is not sound or one is not there, [`Error::Io`].
pub fn shards_of_adapter(store: &dyn Store, name: &str) -> Result<Vec<String>> {
    let files = read_index(store, name).map_err(|error| error.of(Owner::Adapter))?;
    Ok(files.shards.into_iter().map(|shard| shard.name).collect())
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
        let name_of = |location: &Location| {
            let name = &shards[location.shard].name;
            name.strip_prefix(&index.folder).unwrap_or(name)
        };
        match tensors.get(&format!("{}{tensor}", index.prefix)) {
            None => {
                return Err(Error::checkpoint(
                    path,
                    format!("places tensor {tensor} in {shard}, which does not hold it"),
                ));
            }
            Some(location) if name_of(location) != shard => {
                let actual = name_of(location);
                return Err(Error::checkpoint(
                    path,
                    format!("places tensor {tensor} in {shard}, but it stands in {actual}"),
                ));
            }
            Some(_) => {}
        }
    }
    let own = tensors.keys().filter_map(|name| name.strip_prefix(&index.prefix));
    let unlisted: Vec<_> = own.filter(|name| !map.contains_key(*name)).collect();
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
