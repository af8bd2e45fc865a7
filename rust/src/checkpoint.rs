//! A base model on disk: one or more safetensors shards seen as one map from name to tensor.

pub mod names;
pub mod quantized;
pub mod side_files;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::Value;

use crate::error::{Error, Owner, Result};
use crate::parallel::task::Task;
use crate::storage::file_names::{ADAPTER_FILES, shard_of};
use crate::storage::local;
use crate::storage::staging;
use crate::tensor::safetensors::{NamedTensor, TensorFile, TensorInfo};

/// The file names under which libraries save a whole model, in the order in which transformers
/// looks for them; diffusers' come after.
const SINGLE_FILES: [&str; 2] = ["model.safetensors", "diffusion_pytorch_model.safetensors"];
const INDEX_SUFFIX: &str = ".safetensors.index.json";
/// How the classes of transformers end that have a language head.
const LANGUAGE_MODELS: [&str; 3] = ["ForCausalLM", "LMHeadModel", "ForConditionalGeneration"];

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

/// A JSON object, and the bytes that it was read from.
type Object = (serde_json::Map<String, Value>, Vec<u8>);

/// One shard of a checkpoint.
#[derive(Debug)]
pub struct Shard {
    /// Its path within the checkpoint's directory.
    pub name: String,
    /// The opened file.
    pub file: TensorFile,
}

/// Where a tensor stands: the shard's position and the tensor's within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// Position in [`Checkpoint::shards`].
    pub shard: usize,
    /// Position in that shard's header.
    pub tensor: usize,
}

/// An opened checkpoint.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    path: PathBuf,
    root: PathBuf,
    is_directory: bool,
    shards: Arc<Vec<Shard>>,
    index: Option<Index>,
    tensors: IndexMap<String, Location>,
    /// With the bytes that it was read from.
    config: Option<Object>,
    warnings: Vec<String>,
}

impl Checkpoint {
    /// Opens a directory (`model.safetensors`, an index and its shards, or diffusers' names for
    /// them) or a single `.safetensors` file, and checks every header.
    ///
    /// # Errors
    /// [`Error::Io`] if something is not there, [`Error::Checkpoint`] if it is not sound.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, &Task::new())
    }

    /// The same, as a part of a task that can be cancelled.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`], and [`Error::Cancelled`].
    pub fn open_with(path: &Path, task: &Task) -> Result<Self> {
        let metadata = local::metadata(path).map_err(|error| Error::io(path, error))?;
        let is_directory = metadata.is_dir();
        let (root, files) = if is_directory {
            (path.to_path_buf(), find_files(path)?)
        } else {
            let name = file_name(path);
            if !name.ends_with(".safetensors") {
                return Err(Error::checkpoint(
                    path,
                    "is not a .safetensors file; give a model directory or a .safetensors file",
                ));
            }
            let root = match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
                _ => PathBuf::from("."),
            };
            (root, Files { shards: vec![name], index: None })
        };
        staging::check_whole(&root)?;
        local::allow_open(files.shards.len());
        let shards = files
            .shards
            .into_iter()
            .map(|name| {
                task.check()?;
                let file = TensorFile::open(&root.join(&name))?;
                Ok(Shard { name, file })
            })
            .collect::<Result<Vec<_>>>()?;
        let tensors = gather(&shards)?;
        let mut warnings = Vec::new();
        if let Some(index) = &files.index {
            warnings = check_index(&root.join(&index.file_name), index, &shards, &tensors)?;
        }
        if is_directory {
            warnings.extend(missing_side_files(path));
        } else if let Some((_, number, count)) = shard_of(&file_name(path)).filter(|of| of.2 > 1) {
            let path = path.display();
            warnings.push(format!("{path}: is shard {number} of {count}, not a whole model"));
        }
        let config = read_config(&root.join("config.json"))?;
        Ok(Self {
            path: path.to_path_buf(),
            root,
            is_directory,
            shards: Arc::new(shards),
            index: files.index,
            tensors,
            config,
            warnings,
        })
    }

    /// A model in memory, as one shard of that name. Tensors without bytes can be planned against.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the tensors are not what their shapes and types say.
    pub fn in_memory(
        name: &str,
        config: serde_json::Map<String, Value>,
        tensors: Vec<NamedTensor>,
    ) -> Result<Self> {
        let path = PathBuf::from(name);
        let file = TensorFile::in_memory(&path, Owner::Checkpoint, tensors, None)?;
        let shards = vec![Shard { name: name.to_owned(), file }];
        let tensors = gather(&shards)?;
        Ok(Self {
            path,
            root: PathBuf::new(),
            is_directory: false,
            shards: Arc::new(shards),
            index: None,
            tensors,
            config: Some((config, Vec::new())),
            warnings: Vec::new(),
        })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory in which the shards lie.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether a directory was opened rather than a single file.
    pub fn is_directory(&self) -> bool {
        self.is_directory
    }

    /// The shards, in the order of their names' first appearance.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The index file, where there is one.
    pub fn index(&self) -> Option<&Index> {
        self.index.as_ref()
    }

    /// `config.json`, where there is one beside the shards.
    pub fn config(&self) -> Option<&serde_json::Map<String, Value>> {
        self.config.as_ref().map(|(fields, _)| fields)
    }

    /// `config.json` as it stood in its file when the checkpoint was opened.
    pub fn config_bytes(&self) -> Option<&[u8]> {
        self.config.as_ref().map(|(_, bytes)| bytes.as_slice())
    }

    /// Whether the config says that the output head shares the input embeddings.
    pub fn ties_embeddings(&self) -> bool {
        let flag = |config: &serde_json::Map<String, Value>| {
            config.get("tie_word_embeddings").and_then(Value::as_bool)
        };
        self.config().is_some_and(|config| {
            let inner = config.get("text_config").and_then(Value::as_object);
            // Where no config says so, a language model without a head of its own has a tied one.
            let implied = || self.is_language_model() && self.tensor("lm_head.weight").is_none();
            flag(config).or_else(|| inner.and_then(flag)).unwrap_or_else(implied)
        })
    }

    /// Whether its config is of a model of transformers that ends in a language head.
    pub fn is_language_model(&self) -> bool {
        let names = self.config().and_then(|config| config.get("architectures"));
        names
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .any(|name| LANGUAGE_MODELS.iter().any(|ending| name.ends_with(ending)))
    }

    /// What is odd about the checkpoint without making it unusable.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Every tensor by name, shard by shard in the order of its data. A model that repeats layers has
    /// a tensor under several names.
    pub fn tensors(&self) -> &IndexMap<String, Location> {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|location| self.at(*location))
    }

    /// The same files with their tensors under these names.
    pub fn with_tensors(&self, tensors: IndexMap<String, Location>) -> Self {
        Self { tensors, ..self.clone() }
    }

    /// Looks again at every shard: an error if one is not what was opened.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if one changed, [`Error::Io`].
    pub fn check_unchanged(&self) -> Result<()> {
        self.shards.iter().try_for_each(|shard| shard.file.check_unchanged())
    }

    /// The tensor at that place.
    pub fn at(&self, location: Location) -> &TensorInfo {
        &self.shards[location.shard].file.header().tensors[location.tensor]
    }
}

struct Files {
    shards: Vec<String>,
    index: Option<Index>,
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Decides which files of a directory make up the model.
fn find_files(directory: &Path) -> Result<Files> {
    let mut names = Vec::new();
    for path in local::paths_in(directory)? {
        names.push(file_name(&path));
    }
    names.sort();
    let has = |name: &str| names.iter().any(|other| other == name);
    let single = |name: &str| Files { shards: vec![name.to_owned()], index: None };
    for name in SINGLE_FILES {
        if has(name) {
            return Ok(single(name));
        }
        let index = name.replace(".safetensors", INDEX_SUFFIX);
        if has(&index) {
            return read_index(directory, &index);
        }
    }
    let refuse = |message: String| Err(Error::checkpoint(directory, message));
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
        ([index], _) => read_index(directory, index),
        ([], [name]) => match shard_of(name) {
            Some((_, _, count)) if count > 1 => refuse(format!(
                "holds {name}, one shard of {count}, and no index; fetch the others and the index"
            )),
            _ => Ok(single(name)),
        },
        ([], []) if names.iter().any(|name| name.ends_with(".bin") || name.ends_with(".pth")) => {
            refuse(
                "holds its weights as .bin files; save it with safe_serialization first \
                 (load and save_pretrained in transformers)"
                    .into(),
            )
        }
        ([], []) => refuse(
            "holds no model: neither model.safetensors nor model.safetensors.index.json \
             nor another .safetensors file"
                .into(),
        ),
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

fn read_index(directory: &Path, name: &str) -> Result<Files> {
    let path = directory.join(name);
    let (content, bytes) = read_object(&path)?;
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
        if local::find(&directory.join(shard))?.is_none() {
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
    check_count(directory, &shards)?.map_or(Ok(()), |message| Err(broken(message)))?;
    Ok(Files { shards, index: Some(Index { file_name: name.to_owned(), content, bytes }) })
}

/// What is wrong with an index that names some shards, of whose names tell that there are more, while
/// the others are not there. A shard without tensors is in no index, but it is there.
fn check_count(directory: &Path, shards: &[String]) -> Result<Option<String>> {
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
            if local::find(&directory.join(&name))?.is_none() {
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

/// What a copy of a model that lorafast has written lacks.
fn missing_side_files(directory: &Path) -> Option<String> {
    let missing = staging::missing_files(directory);
    let first = missing.first()?;
    Some(format!(
        "{}: {} of the files that its {} lists are not there (the first: {first}); the copy may \
         have been cut off",
        directory.display(),
        missing.len(),
        staging::MANIFEST
    ))
}

/// Reads a file that must hold one JSON object: the object, and its bytes.
fn read_object(path: &Path) -> Result<Object> {
    let (text, _) = local::read_small(path)?;
    let content = serde_json::from_slice(&text)
        .map_err(|error| Error::checkpoint(path, format!("is not a JSON object: {error}")))?;
    Ok((content, text))
}

fn read_config(path: &Path) -> Result<Option<Object>> {
    if local::find(path)?.is_some() { read_object(path).map(Some) } else { Ok(None) }
}

fn gather(shards: &[Shard]) -> Result<IndexMap<String, Location>> {
    let mut tensors = IndexMap::<String, Location>::new();
    for (shard, Shard { name, file }) in shards.iter().enumerate() {
        for (tensor, info) in file.header().tensors.iter().enumerate() {
            if let Some(first) = tensors.insert(info.name.clone(), Location { shard, tensor }) {
                let other = &shards[first.shard].name;
                return Err(Error::checkpoint(
                    file.path(),
                    format!("tensor {} stands in {other} and again in {name}", info.name),
                ));
            }
        }
    }
    Ok(tensors)
}

/// Holds the index against the shards. A tensor in the wrong shard is an error, because loaders
/// would miss it; one that the index does not list is only odd.
fn check_index(
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
            "{}: {} tensors stand in the shards but not in the index (the first: {first}); \
             they are carried over and listed in the output's index",
            path.display(),
            unlisted.len(),
        )],
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::tensor::dtype::Dtype;
    use crate::tensor::safetensors::Header;

    fn write_shard(path: &Path, names: &[&str]) {
        let tensors = names
            .iter()
            .enumerate()
            .map(|(position, name)| TensorInfo {
                name: (*name).to_owned(),
                dtype: Dtype::F32,
                shape: vec![1],
                range: position as u64 * 4..(position as u64 + 1) * 4,
            })
            .collect();
        let mut bytes = Header { tensors, ..Header::default() }.encode();
        bytes.resize(bytes.len() + 4 * names.len(), 0);
        fs::write(path, bytes).expect("written");
    }

    fn complaint(directory: &Path) -> String {
        Checkpoint::open(directory).expect_err("a broken checkpoint").to_string()
    }

    #[test]
    fn a_sharded_directory_is_one_map() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path();
        write_shard(&root.join("a.safetensors"), &["x", "y"]);
        write_shard(&root.join("b.safetensors"), &["z"]);
        let index = root.join("model.safetensors.index.json");
        let map = r#"{"weight_map": {"z": "b.safetensors", "x": "a.safetensors"}}"#;
        fs::write(&index, map).expect("written");
        let checkpoint = Checkpoint::open(root).expect("sound");
        assert_eq!(checkpoint.tensors().keys().collect::<Vec<_>>(), ["x", "y", "z"]);
        assert_eq!(checkpoint.tensor("z").expect("there").shape, [1]);
        assert!(checkpoint.warnings()[0].contains("the first: y"));
    }

    #[test]
    fn an_index_must_tell_the_truth() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path();
        write_shard(&root.join("a.safetensors"), &["x"]);
        write_shard(&root.join("b.safetensors"), &["z"]);
        let index = |map: &str| {
            fs::write(root.join("model.safetensors.index.json"), map).expect("written");
            complaint(root)
        };
        assert!(index("[]").contains("not a JSON object"));
        assert!(index("{}").contains("no weight_map"));
        assert!(index(r#"{"weight_map": {}}"#).contains("empty weight_map"));
        assert!(index(r#"{"weight_map": {"x": 1}}"#).contains("no file name"));
        assert!(
            index(r#"{"weight_map": {"x": "../a.safetensors"}}"#).contains("leaves its directory")
        );
        assert!(
            index(r#"{"weight_map": {"x": "/a.safetensors"}}"#).contains("leaves its directory")
        );
        assert!(index(r#"{"weight_map": {"x": "c.safetensors"}}"#).contains("which is not there"));
        assert!(
            index(r#"{"weight_map": {"x": "a.safetensors", "q": "a.safetensors"}}"#)
                .contains("does not hold it")
        );
        assert!(
            index(r#"{"weight_map": {"x": "b.safetensors", "z": "a.safetensors"}}"#)
                .contains("but it stands in")
        );
        write_shard(&root.join("b.safetensors"), &["x"]);
        assert!(
            index(r#"{"weight_map": {"x": "a.safetensors", "z": "b.safetensors"}}"#)
                .contains("stands in a.safetensors and again in b.safetensors")
        );
    }

    #[test]
    fn what_is_no_model_is_named() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path();
        assert!(complaint(root).contains("holds no model"));
        fs::write(root.join("pytorch_model.bin"), "").expect("written");
        assert!(complaint(root).contains("as .bin files"));
        write_shard(&root.join("one.safetensors"), &["x"]);
        assert!(Checkpoint::open(root).is_ok());
        write_shard(&root.join("two.safetensors"), &["x"]);
        assert!(complaint(root).contains("no index that says"));
        assert!(Checkpoint::open(&root.join("two.safetensors")).is_ok());
        fs::write(root.join("adapter_config.json"), "{}").expect("written");
        assert!(complaint(root).contains("is an adapter"));
        assert!(matches!(Checkpoint::open(&root.join("absent")), Err(Error::Io { .. })));
    }
}
