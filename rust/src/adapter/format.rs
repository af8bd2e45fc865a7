//! Formats: how an adapter is recognized, read and written.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::formats::image::LoneFile;
use super::{Adapter, computed, formats};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Owner, Result};
use crate::parallel::task::Task;
use crate::storage::directory::{self, LocalDirectory};
use crate::storage::local::{self, Stamp};
use crate::storage::store::Store;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{NamedTensor, Tensor, TensorFile};

/// A format of adapters. Each is one file (or folder) of `formats/`, and one entry of [`FORMATS`].
pub trait Format: Sync {
    /// Its name in reports.
    fn name(&self) -> &'static str;

    /// Whether what lies there is an adapter of this format, by names and headers alone.
    ///
    /// # Errors
    /// [`Error::Io`] if something cannot be looked at.
    fn detect(&self, place: &Place<'_>) -> Result<bool>;

    /// The name of the file of its weights, where that is a safetensors file.
    fn weights(&self, place: &Place<'_>) -> String;

    /// The adapter that lies there.
    ///
    /// # Errors
    /// [`Error::Io`] if something is not there, [`Error::Adapter`] if it is not sound,
    /// [`Error::Unsupported`] if it is of a kind that cannot be read, [`Error::Cancelled`].
    fn read(&self, place: &Place<'_>, task: &Task) -> Result<Adapter>;

    /// Writes an adapter, from whatever format it was read, so that reading it gives the same
    /// updates: into a directory, or to a file, as the format has it. What is there is replaced.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what the format cannot say, [`Error::Argument`] if it needs more
    /// than the options have, [`Error::Io`]; nothing half-written is left under a name of the
    /// format's.
    fn write(&self, adapter: &Adapter, target: &Path, options: &WriteOptions<'_>) -> Result<()>;
}

/// What an adapter is written for. The default is what the adapter itself says.
#[derive(Debug, Clone, Default)]
pub struct WriteOptions<'a> {
    /// The base that it belongs to, for formats that need to know more of it than an adapter says.
    pub base: Option<&'a Checkpoint>,
    /// The element type of its tensors, where they are not to keep their own.
    pub dtype: Option<Dtype>,
}

impl WriteOptions<'_> {
    /// A tensor in the type that was asked for, which is made when it is read.
    ///
    /// # Errors
    /// When it is read, [`Error::Argument`] if a finite value is none in that type.
    pub fn cast(&self, tensor: &Tensor) -> Result<Tensor> {
        let Some(dtype) = self.dtype.as_ref().filter(|dtype| **dtype != tensor.dtype) else {
            return Ok(tensor.clone());
        };
        if !tensor.dtype.is_mergeable() {
            return Ok(tensor.clone());
        }
        let (name, own) = (tensor.name.clone(), dtype.clone());
        computed::cast(tensor, dtype, move || {
            Error::Argument(format!(
                "{name} has values too large for {own}; write it in a wider type"
            ))
        })
    }
}

/// Every format, in the order in which they are tried.
pub const FORMATS: &[&dyn Format] = &[
    &formats::mlx::Mlx,
    &formats::torchtune::Torchtune,
    &formats::tinker::Tinker,
    &formats::peft::Peft,
    &formats::gguf::Gguf,
    &formats::image::CLONE_OF_SIMO,
    &formats::image::XLABS,
    &formats::image::ONE_TRAINER,
    &formats::image::LYCORIS,
    &formats::image::COMFY_UI,
    &formats::image::DIFFUSERS,
    &formats::image::BFL,
    &formats::kohya::Kohya,
];

/// The format of that name.
pub fn named(name: &str) -> Option<&'static dyn Format> {
    FORMATS.iter().find(|format| format.name() == name).copied()
}

/// Unpickles the weights of an adapter, as often as it is opened.
pub type Load = Arc<dyn Fn() -> Result<Vec<NamedTensor>> + Send + Sync>;

/// A weights file that somebody else has to read.
#[derive(Clone)]
pub struct Pickle {
    /// The file.
    pub path: PathBuf,
    /// What reads it.
    pub load: Load,
}

impl fmt::Debug for Pickle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Pickle").field("path", &self.path).finish_non_exhaustive()
    }
}

/// What tells the scale of an adapter whose config is not there.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum GivenScale {
    /// Nothing does, and the adapter is refused.
    #[default]
    Refused,
    /// Nothing does, and alphas and scales are NaN: for who looks at what needs none.
    Unknown,
    /// Each module's scale is this over its rank.
    Alpha(f64),
    /// Each module has this scale.
    Factor(f64),
}

/// Where an adapter is opened from.
#[derive(Debug, Clone)]
pub struct AdapterSource {
    /// Its directory, or a weights file: what messages call it.
    pub path: PathBuf,
    /// What holds its files, where that is no directory of the file system.
    pub store: Option<Arc<dyn Store>>,
    /// The name of its weights there, where these were asked for and no directory.
    pub file_in_store: Option<String>,
    /// What holds its weights, where that is no safetensors file.
    pub pickle: Option<Pickle>,
    /// What tells its scale, where its config is not there.
    pub scale: GivenScale,
    /// The name of its format, where that is not to be told by what lies there.
    pub format: Option<String>,
}

impl AdapterSource {
    /// Of an adapter whose weights are a safetensors file.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            store: None,
            file_in_store: None,
            pickle: None,
            scale: GivenScale::Refused,
            format: None,
        }
    }

    /// Of an adapter whose files are a store's.
    pub fn in_store(store: Arc<dyn Store>) -> Self {
        Self { store: Some(store.clone()), ..Self::at(store.root()) }
    }

    /// Of an adapter that is one file of a store.
    pub fn file_in_store(store: Arc<dyn Store>, name: &str) -> Self {
        let path = store.path(name);
        Self { store: Some(store), file_in_store: Some(name.to_owned()), ..Self::at(path) }
    }

    /// Of an adapter whose weights somebody else has to read.
    pub fn pickled(path: impl Into<PathBuf>, pickle: Pickle) -> Self {
        Self { pickle: Some(pickle), ..Self::at(path) }
    }

    /// The same with what tells the scale where its config is not there.
    #[must_use]
    pub fn with_scale(self, scale: GivenScale) -> Self {
        Self { scale, ..self }
    }

    /// The same in a format of that name, whatever tells another.
    #[must_use]
    pub fn in_format(self, name: Option<String>) -> Self {
        Self { format: name, ..self }
    }

    /// Opens the adapter, in whatever format it is.
    ///
    /// # Errors
    /// Those of [`Format::read`]; what is there, where that is of no format that can be read.
    pub fn open(&self, task: &Task) -> Result<Adapter> {
        self.open_for(None, task)
    }

    /// Opens the adapter for a base, which tells the names of its own modules from those that
    /// training tools put around them.
    ///
    /// # Errors
    /// Those of [`AdapterSource::open`].
    pub fn open_for(&self, base: Option<&Checkpoint>, task: &Task) -> Result<Adapter> {
        match self.look_for(base, task)? {
            Found::Adapter(adapter) => Ok(*adapter),
            Found::Unread(unread) => Err(unread.refusal()),
        }
    }

    /// Opens the adapter, or tells what it is where it is of a format that cannot be read.
    ///
    /// # Errors
    /// Those of [`Format::read`]; what is there, where that is no adapter.
    pub fn look(&self, task: &Task) -> Result<Found> {
        self.look_for(None, task)
    }

    fn look_for(&self, base: Option<&Checkpoint>, task: &Task) -> Result<Found> {
        task.check()?;
        if let Some(store) = &self.store {
            store.follow(task.cancel_flag());
        }
        let place = Place { base, ..Place::find(self)? };
        match format_of(&place)? {
            Some(format) => format.read(&place, task).map(|adapter| Found::Adapter(adapter.into())),
            None => formats::unread::look(&place, task),
        }
    }

    /// Whether an adapter lies there, of whatever format, by names and headers alone; an adapter's
    /// files count as one even if they cannot be read.
    ///
    /// # Errors
    /// [`Error::Io`] if something is not there or cannot be looked at.
    pub fn is_adapter(&self) -> Result<bool> {
        let place = Place::find(self)?;
        let found = format_of(&place);
        // What is of several formats is an adapter all the same.
        if found.is_err() && formats::image::ambiguity(&place).is_some() {
            return Ok(true);
        }
        Ok(found?.is_some() || formats::unread::is_adapter(&place)?)
    }

    /// The name of its format; `None` where no format knows what lies there.
    ///
    /// # Errors
    /// [`Error::Io`] if something is not there or cannot be looked at.
    pub fn format(&self) -> Result<Option<&'static str>> {
        Ok(format_of(&Place::find(self)?)?.map(Format::name))
    }

    /// The bytes of its weights, as far as that is known before it is opened.
    pub fn expected_bytes(&self) -> u64 {
        if self.store.is_some() {
            // Nobody is asked for a guess.
            return 0;
        }
        let weights = match &self.pickle {
            Some(pickle) => Ok(pickle.path.clone()),
            None => Place::find(self).and_then(|place| {
                // That of most adapters needs no look into it.
                let usual = formats::peft::WEIGHTS;
                let is_usual = place.file.is_none() && place.store.is_file(usual);
                let name = if is_usual { usual.to_owned() } else { weights_of(&place)? };
                Ok(place.store.path(&name))
            }),
        };
        let metadata = weights.ok().and_then(|weights| local::metadata(&weights).ok());
        metadata.map_or(0, |metadata| metadata.len())
    }
}

impl Adapter {
    /// Opens the adapter that lies at a path, in whatever format it is.
    ///
    /// # Errors
    /// Those of [`Format::read`].
    pub fn open(path: &Path) -> Result<Self> {
        AdapterSource::at(path).open(&Task::new())
    }
}

/// What lies where an adapter was looked for.
#[derive(Debug)]
pub enum Found {
    /// An adapter, read.
    Adapter(Box<Adapter>),
    /// An adapter of a format that is known by name only.
    Unread(formats::unread::Unread),
}

/// The format of what lies there, if it is one that can be read: the one that was given, or the first that
/// knows it.
fn format_of(place: &Place<'_>) -> Result<Option<&'static dyn Format>> {
    if let Some(name) = &place.source.format {
        let Some(format) = FORMATS.iter().find(|format| format.name() == name) else {
            let known: Vec<_> = FORMATS.iter().map(|format| format.name()).collect();
            let known = known.join(", ");
            return Err(Error::Argument(format!("format {name:?} is none of {known}")));
        };
        // PEFT's without its config is read by who looks at what no format knows.
        let lacks_config = *name == formats::peft::Peft.name() && !format.detect(place)?;
        return Ok((!lacks_config).then_some(*format));
    }
    for format in FORMATS {
        if format.detect(place)? {
            return Ok(Some(*format));
        }
    }
    Ok(None)
}

/// The name of the file of weights; empty where no format knows it.
fn weights_of(place: &Place<'_>) -> Result<String> {
    Ok(format_of(place)?.map_or_else(String::new, |format| format.weights(place)))
}

/// What lies where an adapter was asked for.
#[derive(Debug)]
pub struct Place<'a> {
    /// What was asked for.
    pub source: &'a AdapterSource,
    /// The files of its directory.
    pub store: Arc<dyn Store>,
    /// The name of its weights, where these were asked for and no directory.
    pub file: Option<String>,
    /// The base that it is opened for, where there is one.
    pub base: Option<&'a Checkpoint>,
    /// What was opened, by its name; of what somebody else reads, without one. A format that asks
    /// whether an adapter is its own and the one that reads it open a file once.
    opened: Mutex<HashMap<String, Arc<TensorFile>>>,
    /// Its one file, once it was looked at.
    pub lone_file: LoneFile,
}

impl<'a> Place<'a> {
    fn find(source: &'a AdapterSource) -> Result<Self> {
        if let Some(store) = &source.store {
            return Ok(Self::new(source, store.clone(), source.file_in_store.clone()));
        }
        let path = source.path.as_path();
        let failed = |error: Error| error.of(Owner::Adapter);
        match local::find(path).map_err(failed)? {
            Some(metadata) if metadata.is_dir() => {
                let store = Arc::new(LocalDirectory(path.to_path_buf()));
                Ok(Self::new(source, store, None))
            }
            Some(_) => {
                let (store, name) = directory::of_file(path);
                Ok(Self::new(source, Arc::new(store), Some(name)))
            }
            None => Err(Error::io(path, local::absence_of(path))),
        }
    }

    fn new(source: &'a AdapterSource, store: Arc<dyn Store>, file: Option<String>) -> Self {
        Self {
            source,
            store,
            file,
            base: None,
            opened: Mutex::default(),
            lone_file: LoneFile::default(),
        }
    }

    /// A safetensors file of the directory.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened, [`Error::Adapter`] if it is not sound.
    pub fn open(&self, name: &str) -> Result<Arc<TensorFile>> {
        self.once(name, || TensorFile::open_in(&*self.store, name, Owner::Adapter))
    }

    /// The tensors of weights that somebody else reads.
    ///
    /// # Errors
    /// [`Error::Io`] if they are not there, what the reader raises, [`Error::Adapter`].
    pub fn pickled(&self) -> Result<Arc<TensorFile>> {
        let Some(Pickle { path, load }) = &self.source.pickle else {
            return Err(Error::Argument("there is nothing to be read by somebody else".into()));
        };
        self.once("", || {
            if self.source.store.is_some() {
                return TensorFile::in_memory(path, Owner::Adapter, load()?, None);
            }
            let (_, metadata) = local::open(path).map_err(|error| error.of(Owner::Adapter))?;
            let stamp = Stamp::of(&metadata);
            TensorFile::in_memory(path, Owner::Adapter, load()?, Some(stamp))
        })
    }

    fn once(
        &self,
        name: &str,
        open: impl FnOnce() -> Result<TensorFile>,
    ) -> Result<Arc<TensorFile>> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = opened.get(name) {
            return Ok(file.clone());
        }
        let file = Arc::new(open()?);
        opened.insert(name.to_owned(), file.clone());
        Ok(file)
    }

    /// What messages call the adapter.
    pub fn path(&self) -> &'a Path {
        &self.source.path
    }

    /// Whether the directory has an entry of that name.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Adapter`] for a link that leads nowhere.
    pub fn has(&self, name: &str) -> Result<bool> {
        self.store.has(name).map_err(|error| error.of(Owner::Adapter))
    }
}
