//! Base models: one or more safetensors shards of a store, or a loaded module, seen as one map from
//! name to tensor.

pub mod components;
pub mod heads;
pub mod index;
pub mod names;
pub mod pipeline;
pub mod quantized;
pub mod side_files;
pub mod tokenizer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::Value;

use crate::error::{Error, Owner, Result};
use crate::parallel::task::Task;
use crate::storage::directory::{self, LocalDirectory};
use crate::storage::file_names::shard_of;
use crate::storage::identify;
use crate::storage::local;
use crate::storage::memory::InMemory;
use crate::storage::staging;
use crate::storage::store::Store;
use crate::tensor::safetensors::{NamedTensor, TensorFile, TensorInfo};
pub use index::Index;
use index::{Files, ShardFile};
use pipeline::{FoundPipeline, MODEL_INDEX, Pipeline};

/// What describes a model, beside its weights.
const CONFIG: &str = "config.json";
/// How the classes of transformers end that have a language head.
const LANGUAGE_MODELS: [&str; 3] = ["ForCausalLM", "LMHeadModel", "ForConditionalGeneration"];

/// A JSON object, and the bytes that it was read from.
pub type Object = (serde_json::Map<String, Value>, Vec<u8>);

/// One shard of a checkpoint.
#[derive(Debug)]
pub struct Shard {
    /// Its path within the checkpoint's directory.
    pub name: String,
    /// What the names of its tensors begin with in the checkpoint, and not in the file: in a
    /// pipeline the component's.
    pub prefix: String,
    /// The opened file, whose tensors have the checkpoint's names.
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
    noun: &'static str,
    /// What holds the files.
    store: Arc<dyn Store>,
    is_directory: bool,
    shards: Arc<Vec<Shard>>,
    indexes: Vec<Index>,
    tensors: IndexMap<String, Location>,
    /// With the bytes that it was read from.
    config: Option<Object>,
    pipeline: Option<Arc<Pipeline>>,
    warnings: Vec<String>,
    notes: Vec<String>,
}

impl Checkpoint {
    /// Opens a directory (`model.safetensors`, an index and its shards, or diffusers' names for
    /// them; or a pipeline of diffusers) or a single `.safetensors` file, and checks every header.
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
        if metadata.is_dir() {
            return Self::open_in(Arc::new(LocalDirectory(path.to_path_buf())), task);
        }
        let (directory, name) = directory::of_file(path);
        Ok(Self {
            path: path.to_path_buf(),
            ..Self::open_file_in(Arc::new(directory), &name, task)?
        })
    }

    /// Opens a single `.safetensors` file of a store.
    ///
    /// # Errors
    /// As [`Checkpoint::open_with`].
    pub fn open_file_in(store: Arc<dyn Store>, name: &str, task: &Task) -> Result<Self> {
        let path = store.path(name);
        store.follow(task.cancel_flag());
        if !name.ends_with(".safetensors") {
            let found = identify::of_file(&*store, name);
            return Err(Error::checkpoint(
                &path,
                match found.filter(|found| !found.is_safetensors()) {
                    Some(found) => found.sentence(),
                    None => {
                        "is not a .safetensors file; give a model directory or a .safetensors file"
                            .to_owned()
                    }
                },
            ));
        }
        let mut warnings = Vec::new();
        if let Some((_, number, count)) = shard_of(name).filter(|of| of.2 > 1) {
            let path = path.display();
            warnings.push(format!("{path}: is shard {number} of {count}, not a whole model"));
        }
        let mut file = Self::of_files(store, Files::single(name), task)?;
        file.path = path;
        file.is_directory = false;
        file.warnings.extend(warnings);
        Ok(file)
    }

    /// Opens the model whose files are those of a store.
    ///
    /// # Errors
    /// As [`Checkpoint::open_with`].
    pub fn open_in(store: Arc<dyn Store>, task: &Task) -> Result<Self> {
        store.follow(task.cancel_flag());
        let mut model = if store.has(MODEL_INDEX)? {
            Self::of_pipeline(store, task)?
        } else {
            let files = index::find_files(&*store)?;
            Self::of_files(store, files, task)?
        };
        model.warnings.extend(missing_side_files(&*model.store));
        Ok(model)
    }

    /// Opens a pipeline. What lies in the directory itself describes all of it: a config there would
    /// be none of a component's.
    fn of_pipeline(store: Arc<dyn Store>, task: &Task) -> Result<Self> {
        let FoundPipeline { pipeline, files, warnings, notes } = pipeline::find(&*store)?;
        let mut model = Self::of_files(store, files, task)?;
        model.config = None;
        model.pipeline = Some(Arc::new(pipeline));
        model.warnings.extend(warnings);
        model.notes = notes;
        Ok(model)
    }

    fn of_files(store: Arc<dyn Store>, files: Files, task: &Task) -> Result<Self> {
        store.check_whole()?;
        local::allow_open(files.shards.len());
        let open = |ShardFile { name, prefix }| {
            task.check()?;
            let mut file = TensorFile::open_in(&*store, &name, Owner::Checkpoint)?;
            file.name_under(&prefix);
            Ok(Shard { name, prefix, file })
        };
        let shards = files.shards.into_iter().map(open).collect::<Result<Vec<_>>>()?;
        let tensors = gather(&shards)?;
        let mut warnings = Vec::new();
        for index in &files.indexes {
            let path = store.path(&index.file_name);
            warnings.extend(index::check_index(&path, index, &shards, &tensors)?);
        }
        warnings.extend(shards.iter().filter_map(|Shard { file, .. }| {
            Some(format!("{}: {}", file.path().display(), file.header().left_empty()?))
        }));
        let config = read_config(&*store)?;
        Ok(Self {
            path: store.root().to_path_buf(),
            noun: "base",
            store,
            is_directory: true,
            shards: Arc::new(shards),
            indexes: files.indexes,
            tensors,
            config,
            pipeline: None,
            warnings,
            notes: Vec::new(),
        })
    }

    /// A loaded module, as one shard of that name. Tensors without bytes can be planned against.
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
        let shards = vec![Shard { name: name.to_owned(), prefix: String::new(), file }];
        let tensors = gather(&shards)?;
        Ok(Self {
            store: Arc::new(InMemory { name: path.clone(), files: BTreeMap::new() }),
            path,
            noun: "module",
            is_directory: false,
            shards: Arc::new(shards),
            indexes: Vec::new(),
            tensors,
            config: Some((config, Vec::new())),
            pipeline: None,
            warnings: Vec::new(),
            notes: Vec::new(),
        })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What messages call it: "base", or "module" where it is one that is loaded.
    pub fn noun(&self) -> &'static str {
        self.noun
    }

    /// Whether it is a model's files, rather than a module that is loaded.
    pub fn is_stored(&self) -> bool {
        self.noun == "base"
    }

    /// What holds the shards and what lies beside them.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Whether a directory, or another store, was opened rather than a single file.
    pub fn is_directory(&self) -> bool {
        self.is_directory
    }

    /// The shards, in the order of their names' first appearance.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The index files: of a pipeline one for each component that has one, else at most one.
    pub fn indexes(&self) -> &[Index] {
        &self.indexes
    }

    /// What a pipeline says of itself, where it is one.
    pub fn pipeline(&self) -> Option<&Pipeline> {
        self.pipeline.as_deref()
    }

    /// `config.json`, where there is one beside the shards. A pipeline has none of its own.
    pub fn config(&self) -> Option<&serde_json::Map<String, Value>> {
        self.config.as_ref().map(|(fields, _)| fields)
    }

    /// `config.json` as it stood in its file when the checkpoint was opened.
    pub fn config_bytes(&self) -> Option<&[u8]> {
        self.config.as_ref().map(|(_, bytes)| bytes.as_slice())
    }

    /// The config that describes a tensor or a module: in a pipeline its component's, else the only
    /// one.
    pub fn config_of(&self, name: &str) -> Option<&serde_json::Map<String, Value>> {
        let Some(pipeline) = self.pipeline() else { return self.config() };
        let of = |part: &&pipeline::Part| name.starts_with(&part.prefix());
        let (fields, _) = pipeline.parts.iter().find(of)?.config.as_ref()?;
        Some(fields)
    }

    /// The name of every config, with its content, the bytes that it was read from, and what the
    /// names of the tensors that it describes begin with.
    pub fn configs(&self) -> Vec<(String, &Object, String)> {
        let own = self.config.iter().map(|config| (CONFIG.to_owned(), config, String::new()));
        let parts = self.pipeline().into_iter().flat_map(|pipeline| &pipeline.parts);
        let of_parts = parts
            .filter_map(|part| Some((part.config_name(), part.config.as_ref()?, part.prefix())));
        own.chain(of_parts).collect()
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

    /// How the checkpoint was read, where that was not plain.
    pub fn notes(&self) -> &[String] {
        &self.notes
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
        /// Questions to a store that are open at the same time.
        const AT_ONCE: usize = 8;
        let check =
            |shards: &[Shard]| shards.iter().try_for_each(|shard| shard.file.check_unchanged());
        if self.shards.iter().all(|shard| shard.file.source().is_local()) {
            return check(&self.shards);
        }
        let share = self.shards.len().div_ceil(AT_ONCE).max(1);
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .shards
                .chunks(share)
                .map(|shards| scope.spawn(move || check(shards)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("a look at a file does not panic"))
                .fold(Ok(()), Result::and)
        })
    }

    /// Tells every shard's source that all of its data will be read, in its order.
    pub fn will_read_all(&self, task: &Task) {
        for Shard { file, .. } in self.shards.iter() {
            let data = file.data_start()..file.size();
            file.source().will_read(&[data], task.cancel_flag());
        }
    }

    /// The tensor at that place.
    pub fn at(&self, location: Location) -> &TensorInfo {
        &self.shards[location.shard].file.header().tensors[location.tensor]
    }
}

/// What a copy of a model that lorafast has written lacks.
fn missing_side_files(store: &dyn Store) -> Option<String> {
    let missing = staging::missing_files(store);
    let first = missing.first()?;
    Some(format!(
        "{}: {} of the files that its {} lists are not there (the first: {first}); the copy may \
         have been cut off",
        store.root().display(),
        missing.len(),
        staging::MANIFEST
    ))
}

/// Reads a file that must hold one JSON object: the object, and its bytes.
fn read_object(store: &dyn Store, name: &str) -> Result<Object> {
    let (text, _) = store.read_small(name)?;
    let broken =
        |error| Error::checkpoint(store.path(name), format!("is not a JSON object: {error}"));
    let content = serde_json::from_slice(&text).map_err(broken)?;
    Ok((content, text))
}

fn read_config(store: &dyn Store) -> Result<Option<Object>> {
    if store.has(CONFIG)? { read_object(store, CONFIG).map(Some) } else { Ok(None) }
}

fn gather(shards: &[Shard]) -> Result<IndexMap<String, Location>> {
    let mut tensors = IndexMap::<String, Location>::new();
    for (shard, Shard { name, file, .. }) in shards.iter().enumerate() {
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
        assert!(complaint(root).contains("is an empty directory"));
        fs::write(root.join("pytorch_model.bin"), "<html>").expect("written");
        assert!(complaint(root).contains("pytorch_model.bin is an HTML page"));
        fs::write(root.join("pytorch_model.bin"), b"\x80\x02}q\x01.").expect("written");
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
