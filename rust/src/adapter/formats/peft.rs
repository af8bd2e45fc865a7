//! PEFT's LoRA: a directory with `adapter_config.json` and `adapter_model.safetensors`.

pub mod config;
mod keys;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use config::PeftConfig;

use crate::adapter::format::{Format, Place};
use crate::adapter::{Adapter, Contents, Grammar, coverage};
use crate::error::{Error, Owner, Result};
use crate::parallel::task::Task;
use crate::storage::local::{self, Stamp};
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

    fn weights(&self, place: &Place<'_>) -> PathBuf {
        if place.is_directory { place.directory.join(WEIGHTS) } else { place.path().to_path_buf() }
    }

    fn read(&self, place: &Place<'_>, task: &Task) -> Result<Adapter> {
        let path = place.path();
        let config_path = place.directory.join(config::FILE_NAME);
        if !place.has(config::FILE_NAME)? {
            return Err(Error::adapter(path, no_config(place.directory)));
        }
        let (text, stamp) =
            local::read_small(&config_path).map_err(|error| error.of(Owner::Adapter))?;
        let config = PeftConfig::parse(&config_path, &text)?;
        let file = Arc::new(open_weights(place)?);
        let fields = config.account();
        let sorted = keys::sort(&file, &config, task).map_err(|error| {
            // Factors that do not pair up are no damage where the config says why.
            match coverage::refused(&fields).as_slice() {
                [] => error,
                _ if matches!(error, Error::Cancelled) => error,
                obstacles => Error::unsupported(path, obstacles.join("; ")),
            }
        })?;
        let keys::Sorted { modules, saved, rows, others } = sorted;
        Ok(Adapter::new(Contents {
            path: path.to_path_buf(),
            format: self.name(),
            file,
            modules,
            saved,
            rows,
            others,
            semantics: config.semantics(),
            grammar: Grammar::Dotted,
            fields,
            summary: config::summary(&config),
            settings: config.into_raw(),
            read_from: vec![(config_path, stamp)],
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
    if local::find(&weights).map_err(|error| error.of(Owner::Adapter))?.is_none() {
        let message = if place.has(PICKLED_WEIGHTS)? {
            format!("holds its weights as {PICKLED_WEIGHTS}, which needs torch to be read")
        } else {
            format!("holds a config but no {WEIGHTS}; fetch the adapter again")
        };
        return Err(Error::adapter(path, message));
    }
    TensorFile::open_adapter(&weights)
}

fn no_config(directory: &Path) -> String {
    let is_file = |path: &Path| local::metadata(path).is_ok_and(|metadata| metadata.is_file());
    let nested = local::paths_in(directory)
        .ok()
        .and_then(|paths| paths.into_iter().find(|path| is_file(&path.join(config::FILE_NAME))));
    let file = config::FILE_NAME;
    match nested {
        Some(path) => format!(
            "holds no {file}, but its folder {} does; give that folder",
            path.file_name().unwrap_or_default().display()
        ),
        None if is_file(&directory.join("config.json")) => {
            format!("holds no {file}; it looks like a whole model, not an adapter")
        }
        None => format!("holds no {file}; it is no PEFT adapter"),
    }
}
