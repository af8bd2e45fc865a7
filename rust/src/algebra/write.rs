//! The result of a computation, written in a format with its provenance.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indexmap::IndexMap;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::engine::{Job, Whole};
use super::options::Writing;
use super::report::Report;
use crate::adapter::{Adapter, Initialization, Module, Semantics};
use crate::checkpoint::Checkpoint;
use crate::convert;
use crate::error::Result;
use crate::parallel::task::Task;
use crate::storage::local;

/// The file that says what an adapter was made from.
const PROVENANCE: &str = "adapter_provenance.json";

/// Where a result goes, and a directory beside it for what is not finished, which is removed with this
/// value.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    path: &'a Path,
    writing: &'a Writing,
    work: PathBuf,
}

/// What a result was made by: the verb, and its parameters.
pub(crate) type Made = (&'static str, Map<String, Value>);

impl<'a> Output<'a> {
    /// Checks that a result can be written there.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] for a format that cannot be written, [`crate::Error::Output`] if
    /// something is there already.
    pub fn check(path: &'a Path, writing: &'a Writing) -> Result<Self> {
        writing.dtype()?;
        convert::check(path, writing.target()?, writing.overwrite)?;
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}.factors", std::process::id()));
        Ok(Self { path, writing, work: path.with_file_name(name) })
    }

    /// How it is written.
    pub fn writing(&self) -> &'a Writing {
        self.writing
    }

    /// A directory for what is not finished.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if it cannot be made.
    pub fn directory(&self) -> Result<&Path> {
        local::create_directories(&self.work)?;
        Ok(&self.work)
    }

    /// Writes modules as an adapter like the one whose names they have, made of inputs with these
    /// descriptions.
    ///
    /// # Errors
    /// Those of conversions; that one of the inputs changed meanwhile.
    pub fn write(
        self,
        job: &Job<'_>,
        modules: IndexMap<String, Module>,
        inputs: Vec<Value>,
        task: &Task,
        report: &mut Report,
    ) -> Result<()> {
        let names = &job.adapters[job.sums.names];
        let semantics = Semantics {
            initialization: Initialization::Plain,
            rank_stabilized: job.rank_stabilized,
            names_scale: false,
            scale_is_given: false,
            ..names.semantics().clone()
        };
        let mut value = names.made_into(modules, semantics);
        if let Whole::Replaced { combined, .. } = &job.whole {
            let (saved, rows) = match combined {
                Some(combined) => (combined.saved.clone(), combined.rows.clone()),
                None => Default::default(),
            };
            value = value.renamed(value.modules().clone(), saved, rows, value.grammar());
        }
        let value = Arc::new(value);
        for input in job.adapters {
            input.check_unchanged()?;
        }
        let made = (job.verb, job.parameters.clone());
        self.write_value(&value, inputs, job.base, made, task, report)
    }

    /// Writes an adapter that was made of inputs with these descriptions.
    ///
    /// # Errors
    /// Those of conversions.
    pub fn write_value(
        self,
        value: &Arc<Adapter>,
        inputs: Vec<Value>,
        base: Option<&Checkpoint>,
        made: Made,
        task: &Task,
        report: &mut Report,
    ) -> Result<()> {
        let provenance = provenance(inputs, made);
        let options = convert::Options {
            to: self.writing.target()?.to_owned(),
            overwrite: self.writing.overwrite,
            unsynced: self.writing.unsynced,
            ..convert::Options::default()
        };
        let written = convert::write_adapter(value, base, self.path, &options, task)?;
        report.lost.extend(written.lost);
        report.notes.extend(written.notes);
        report.files.extend(written.files);
        if let Some(error) = written.max_error.filter(|error| *error > 0.0) {
            report.notes.push(format!(
                "the format {} needed factors of its own, which add {error:.1e} at most to a module's \
                 error",
                report.target_format
            ));
        }
        let path = provenance_path(self.path);
        local::write_small(&path, &provenance)?;
        report.files.push(path);
        Ok(())
    }
}

impl Drop for Output<'_> {
    fn drop(&mut self) {
        local::remove_all(&self.work);
    }
}

/// In the adapter's directory; of a lone file beside it, under its name.
fn provenance_path(output: &Path) -> PathBuf {
    if local::is_directory(output) {
        return output.join(PROVENANCE);
    }
    let mut name = output.file_stem().unwrap_or_default().to_owned();
    name.push(".provenance.json");
    output.with_file_name(name)
}

/// Inputs as a provenance has them.
pub(crate) fn described(inputs: &[Adapter]) -> Result<Vec<Value>> {
    let described = inputs.par_iter().map(|input| {
        Ok(json!({
            "path": input.path().display().to_string(),
            "format": input.format(),
            "sha256": input.sha256()?,
        }))
    });
    described.collect()
}

fn provenance(inputs: Vec<Value>, (verb, parameters): Made) -> Vec<u8> {
    let text = json!({
        "made_by": format!("lorafast {}", env!("CARGO_PKG_VERSION")),
        "verb": verb,
        "inputs": inputs,
        "parameters": parameters,
    });
    serde_json::to_vec_pretty(&text).expect("plain data")
}
