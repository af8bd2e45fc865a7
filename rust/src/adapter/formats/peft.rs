//! PEFT's LoRA: a directory with `adapter_config.json` and `adapter_model.safetensors`.

pub mod config;
mod key_names;
mod keys;
mod methods;
mod others;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use config::{Method, PeftConfig};
use write::ExpertLayout;
pub use write::check_method;

use super::recognize::{self, Kind};
use super::unread;
use crate::adapter::format::{Format, Place, WriteOptions};
use crate::adapter::{Adapter, Contents, Directory, Grammar, coverage};
use crate::checkpoint::index;
use crate::checkpoint::names::wrappers::Wrappers;
use crate::error::{Error, Owner, Result};
use crate::parallel::task::Task;
use crate::storage::local::Stamp;
use crate::storage::{file_names, identify};
use crate::tensor::safetensors::TensorFile;

/// The file of the weights.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// What lists them, where they are several files.
const INDEX: &str = "adapter_model.safetensors.index.json";
/// The same, pickled.
pub const PICKLED_WEIGHTS: &str = "adapter_model.bin";

/// PEFT's format.
#[derive(Debug)]
pub struct Peft;

impl Format for Peft {
    fn name(&self) -> &'static str {
        "peft"
    }

    /// By the config. A file that only lies beside one, by its tensors as well.
    fn detect(&self, place: &Place<'_>) -> Result<bool> {
        let belongs = match &place.file {
            None => true,
            Some(_) if place.source.pickle.is_some() => true,
            Some(file) => file == WEIGHTS || unread::may_be_of_peft(place, file),
        };
        Ok(belongs && place.has(config::FILE_NAME)?)
    }

    fn weights(&self, place: &Place<'_>) -> String {
        place.file.clone().unwrap_or_else(|| WEIGHTS.to_owned())
    }

    fn write(&self, adapter: &Adapter, target: &Path, options: &WriteOptions<'_>) -> Result<()> {
        write::write_adapter(adapter, target, options, ExpertLayout::Parameters)
    }

    fn read(&self, place: &Place<'_>, task: &Task) -> Result<Adapter> {
        let config_path = place.store.path(config::FILE_NAME);
        let read = place.store.read_small(config::FILE_NAME);
        let (text, stamp) = read.map_err(|error| error.of(Owner::Adapter))?;
        let config = PeftConfig::parse(&config_path, &text)?;
        let (file, shards) = open_weights(place)?;
        // Of others beside PEFT's own, the tensor is named that does not belong there.
        if let Some(Kind::Other(found)) = recognize::kind_of(&file)
            && config.method() == Method::Lora
            && !recognize::has_factors_of_peft(&file)
        {
            return Err(Error::unsupported(file.path(), found.sentence()));
        }
        let mut read_from = match place.source.store {
            None => vec![(config_path, stamp)],
            Some(_) => Vec::new(),
        };
        for shard in shards.iter().filter(|_| place.source.store.is_none()) {
            let stamp = place.store.stamp(shard).map_err(|error| error.of(Owner::Adapter))?;
            read_from.push((place.store.path(shard), stamp));
        }
        assemble(place, config, file, shards, read_from, task)
    }
}

impl Peft {
    /// Writes an adapter with the factors of all experts as [experts, …] under their own names, as other
    /// programs than PEFT have them.
    ///
    /// # Errors
    /// As [`Format::write`].
    pub(super) fn write_stacked(
        &self,
        adapter: &Adapter,
        target: &Path,
        options: &WriteOptions<'_>,
    ) -> Result<()> {
        write::write_adapter(adapter, target, options, ExpertLayout::Stacked)
    }
}

/// Reads weights whose config is not there: ranks are those of the factors, scales those that were
/// given.
///
/// # Errors
/// As [`Format::read`].
pub(super) fn read_without_config(
    place: &Place<'_>,
    file: Arc<TensorFile>,
    task: &Task,
) -> Result<Adapter> {
    let config = PeftConfig::missing(file.path(), place.source.scale);
    assemble(place, config, file, Vec::new(), Vec::new(), task)
}

fn assemble(
    place: &Place<'_>,
    config: PeftConfig,
    file: Arc<TensorFile>,
    shards: Vec<String>,
    read_from: Vec<(PathBuf, Stamp)>,
    task: &Task,
) -> Result<Adapter> {
    let path = place.path();
    recognize::check_gathered(&file)?;
    let fields = config.uses();
    let sort = match config.method() {
        Method::Lora => keys::sort,
        Method::Loha | Method::Lokr | Method::Ia3 | Method::Oft => others::sort,
    };
    let sorted = sort(&file, &config, Wrappers::of(place.base), task).map_err(|error| {
        // Factors that do not pair up are no damage where the config says why.
        match coverage::refused(&fields).as_slice() {
            [] => error,
            _ if config.is_missing() || matches!(error, Error::Cancelled) => error,
            obstacles => Error::unsupported(path, obstacles.join("; ")),
        }
    })?;
    let keys::Sorted { modules, saved, rows, others, notes } = sorted;
    let summary = config::summary(&config, &modules);
    Ok(Adapter::new(Contents {
        path: path.to_path_buf(),
        format: Peft.name(),
        file,
        modules,
        saved,
        rows,
        others,
        notes,
        semantics: config.semantics(),
        grammar: Grammar::Dotted,
        fields,
        summary,
        settings: config.into_raw(),
        read_from,
        directory: directory_of(place).map(|directory| directory.with_shards(shards)),
    }))
}

/// The directory that belongs to the adapter: the one that was asked for, or the one of a file under
/// PEFT's own names. A file under another name may lie among others.
fn directory_of(place: &Place<'_>) -> Option<Directory> {
    let weights = match (&place.file, &place.source.pickle) {
        (Some(file), _) => file.clone(),
        (None, Some(pickle)) => pickle.path.file_name()?.to_str()?.to_owned(),
        (None, None) => WEIGHTS.to_owned(),
    };
    let own = place.file.is_none() || [WEIGHTS, PICKLED_WEIGHTS].contains(&weights.as_str());
    own.then(|| Directory::new(place.store.clone(), Some(config::FILE_NAME), weights))
}

/// The weights, and the names of the files that they lie in, where these are several.
fn open_weights(place: &Place<'_>) -> Result<(Arc<TensorFile>, Vec<String>)> {
    let path = place.path();
    if place.source.pickle.is_some() {
        return Ok((place.pickled()?, Vec::new()));
    }
    let weights = Peft.weights(place);
    if let Some((_, number, count)) =
        file_names::shard_of(&weights).filter(|(.., count)| *count > 1)
    {
        return Err(Error::adapter(
            path,
            format!("is file {number} of the {count} of an adapter; give the directory of all"),
        ));
    }
    if place.has(&weights)? {
        return Ok((place.open(&weights)?, Vec::new()));
    }
    if place.file.is_none() && place.has(INDEX)? {
        let shards = index::shards_of_adapter(&*place.store, INDEX)?;
        let open = |name: &String| TensorFile::open_in(&*place.store, name, Owner::Adapter);
        let files = shards.iter().map(open).collect::<Result<Vec<_>>>()?;
        let file = TensorFile::joined(&place.store.path(INDEX), Owner::Adapter, files)?;
        return Ok((Arc::new(file), shards));
    }
    Err(Error::adapter(path, no_weights(place)?))
}

/// What a directory has in the place of the weights that its config belongs to.
fn no_weights(place: &Place<'_>) -> Result<String> {
    if place.has(PICKLED_WEIGHTS)? {
        return Ok(format!("holds its weights as {PICKLED_WEIGHTS}, which needs torch to be read"));
    }
    let mut names = place.store.list().unwrap_or_default();
    names.retain(|name| file_names::holds_weights(name) && !identify::state_of_training(name));
    names.sort();
    Ok(match names.as_slice() {
        [] => format!("holds a config but no {WEIGHTS}; fetch the adapter again"),
        [only] => {
            let found = match only.ends_with(".safetensors") {
                true => unread::kind_in(place, only),
                false => identify::of_file(&*place.store, only).map(|found| found.what),
            };
            let what = found.map_or(String::new(), |what| format!(", which is {what}"));
            format!(
                "holds a config but no {WEIGHTS}, only {only}{what}; if those are the adapter's \
                 weights, give that file"
            )
        }
        several => format!(
            "holds a config but no {WEIGHTS}, only {}; if one of these is the adapter's weights, \
             give that file",
            several.join(", ")
        ),
    })
}
