//! PEFT's LoRA: a directory with `adapter_config.json` and `adapter_model.safetensors`.

pub mod config;
mod key_names;
mod keys;
mod write;

use std::path::Path;
use std::sync::Arc;

use config::PeftConfig;

use crate::adapter::format::{Format, Place};
use crate::adapter::{Adapter, Contents, Grammar, coverage};
use crate::checkpoint::names::wrappers::Wrappers;
use crate::error::{Error, Owner, Result};
use crate::parallel::task::Task;
use crate::storage::local::{self, Stamp};
use crate::storage::store::Store;
use crate::tensor::safetensors::TensorFile;

/// The file of the weights.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// The same, pickled.
pub const PICKLED_WEIGHTS: &str = "adapter_model.bin";

/// PEFT's format.
#[derive(Debug)]
pub struct Peft;

impl Format for Peft {
    fn name(&self) -> &'static str {
        "peft"
    }

    fn detect(&self, place: &Place<'_>) -> Result<bool> {
        place.has(config::FILE_NAME)
    }

    fn weights(&self, place: &Place<'_>) -> String {
        place.file.clone().unwrap_or_else(|| WEIGHTS.to_owned())
    }

    fn write(&self, adapter: &Adapter, target: &Path) -> Result<()> {
        write::write_adapter(adapter, target)
    }

    fn read(&self, place: &Place<'_>, task: &Task) -> Result<Adapter> {
        let path = place.path();
        let config_path = place.store.path(config::FILE_NAME);
        if !place.has(config::FILE_NAME)? {
            return Err(Error::adapter(path, no_config(&*place.store)));
        }
        let read = place.store.read_small(config::FILE_NAME);
        let (text, stamp) = read.map_err(|error| error.of(Owner::Adapter))?;
        let config = PeftConfig::parse(&config_path, &text)?;
        let file = Arc::new(open_weights(place)?);
        let fields = config.uses();
        let sorted =
            keys::sort(&file, &config, Wrappers::of(place.base), task).map_err(|error| {
                // Factors that do not pair up are no damage where the config says why.
                match coverage::refused(&fields).as_slice() {
                    [] => error,
                    _ if matches!(error, Error::Cancelled) => error,
                    obstacles => Error::unsupported(path, obstacles.join("; ")),
                }
            })?;
        let keys::Sorted { modules, saved, rows, others, notes } = sorted;
        Ok(Adapter::new(Contents {
            path: path.to_path_buf(),
            format: self.name(),
            file,
            modules,
            saved,
            rows,
            others,
            notes,
            semantics: config.semantics(),
            grammar: Grammar::Dotted,
            fields,
            summary: config::summary(&config),
            settings: config.into_raw(),
            directory: Some(place.store.clone()),
            read_from: match place.source.store {
                None => vec![(config_path, stamp)],
                Some(_) => Vec::new(),
            },
        }))
    }
}

fn open_weights(place: &Place<'_>) -> Result<TensorFile> {
    let path = place.path();
    if let Some(pickle) = &place.source.pickle {
        let (_, metadata) = local::open(&pickle.path).map_err(|error| error.of(Owner::Adapter))?;
        let stamp = Stamp::of(&metadata);
        return TensorFile::in_memory(&pickle.path, Owner::Adapter, (pickle.load)()?, Some(stamp));
    }
    let weights = Peft.weights(place);
    if !place.has(&weights)? {
        let message = if place.has(PICKLED_WEIGHTS)? {
            format!("holds its weights as {PICKLED_WEIGHTS}, which needs torch to be read")
        } else {
            format!("holds a config but no {WEIGHTS}; fetch the adapter again")
        };
        return Err(Error::adapter(path, message));
    }
    TensorFile::open_in(&*place.store, &weights, Owner::Adapter)
}

fn no_config(store: &dyn Store) -> String {
    let file = config::FILE_NAME;
    let nested = store
        .list()
        .ok()
        .and_then(|names| names.into_iter().find(|name| store.is_file(&format!("{name}/{file}"))));
    match nested {
        Some(name) => format!("holds no {file}, but its folder {name} does; give that folder"),
        None if store.is_file("config.json") => {
            format!("holds no {file}; it looks like a whole model, not an adapter")
        }
        None => format!("holds no {file}; it is no PEFT adapter"),
    }
}
