//! Conversions: an adapter of any format written in another one, read back, and held against what it
//! was made from.

mod difference;
mod experts;
mod methods;
mod modules;
mod naming;
mod on_base;
mod places;
mod targets;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use crate::adapter::format::{self, AdapterSource, WriteOptions};
use crate::adapter::{Adapter, Grammar, Module, grammar};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::diffusion::DiffusionNames;
use crate::error::{Error, Result};
use crate::parallel::task::{Task, build_pool};
use crate::storage::local;
use crate::tensor::dtype::Dtype;
use modules::Converted;
use on_base::OnBase;
use places::Places;
use targets::{Factors, Piece, Target};

/// What is asked of a conversion.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// The name of the target's format.
    pub to: String,
    /// The element type of all factors; as they are, if none.
    pub dtype: Option<String>,
    /// `lora` to make plain factors of every algorithm that is a product of factors.
    pub algorithm: Option<String>,
    /// Whether what the target cannot hold may be left out.
    pub lossy: bool,
    /// Whether files of an adapter that is there already may be replaced.
    pub overwrite: bool,
    /// Whether it is left to the system when the files come to the disk.
    pub unsynced: bool,
}

/// What became of a conversion.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The name of the source's format.
    pub source_format: &'static str,
    /// The name of the target's format.
    pub target_format: &'static str,
    /// The number of modules that were written.
    pub modules: usize,
    /// The largest relative difference of a module's update, read back: of DoRA and others that only the
    /// base's weight makes that of W′ − W, where there is a base. None where something was left out
    /// whose share only the base could tell.
    pub max_error: Option<f64>,
    /// What was left out, in words.
    pub lost: Vec<String>,
    /// What a user would want to know besides.
    pub notes: Vec<String>,
    /// The files that were written.
    pub files: Vec<PathBuf>,
}

/// Converts an adapter.
///
/// # Errors
/// [`Error::Argument`] for a format that cannot be written; [`Error::Unsupported`] with what the target
/// cannot hold, or what only a base tells; [`Error::Output`] if something is there already; those of
/// reading the adapter. Nothing is left behind then.
pub fn convert(
    source: &AdapterSource,
    base: Option<&Checkpoint>,
    output: &Path,
    options: &Options,
    task: &Task,
) -> Result<Report> {
    check_output(output, Target::of(&options.to)?, options.overwrite)?;
    let adapter = Arc::new(source.open_for(base, task)?);
    let obstacles = adapter.obstacles(&[]);
    if !obstacles.is_empty() {
        return Err(Error::unsupported(adapter.path(), obstacles.join("; ")));
    }
    build_pool(None)?.install(|| write_adapter(&adapter, base, output, options, task))
}

/// Whether an adapter of that format can be written there.
///
/// # Errors
/// [`Error::Argument`] for a format that cannot be written, [`Error::Output`] if something is there already.
pub(crate) fn check(output: &Path, to: &str, overwrite: bool) -> Result<()> {
    check_output(output, Target::of(to)?, overwrite)
}

/// Of what adapters in that format can hold: parameters that were trained whole, updates of embeddings, of
/// convolutions, and the factors of all experts together.
///
/// # Errors
/// [`Error::Argument`] for a format that cannot be written.
pub(crate) fn holds(to: &str) -> Result<[bool; 4]> {
    let target = Target::of(to)?;
    let holds = &target.holds;
    let experts = target.expert_matrices().is_some();
    Ok([holds.whole, holds.embeddings, holds.convolutions, experts])
}

/// The adapter with each module of experts as that of the one parameter that its factors belong to; none
/// where there is nothing to tell.
pub(crate) fn of_parameters(adapter: &Adapter) -> Option<Adapter> {
    experts::resolved(adapter)
}

/// The inputs and kernels of the convolutions that modules change, of those whose factors have both taken
/// together; none of those that the base has as no convolution.
pub(crate) fn flattened_inputs<'a>(
    modules: impl Iterator<Item = &'a Module>,
    base: &Checkpoint,
) -> Vec<Option<Vec<u64>>> {
    let names = DiffusionNames::of(base);
    modules.map(|module| methods::inputs_in(base, names.as_ref(), module)).collect()
}

/// Writes an adapter in a format, reads it back, and holds it against what it was, with the threads of the
/// pool that it is called in.
///
/// # Errors
/// As [`convert`].
pub(crate) fn write_adapter(
    adapter: &Arc<Adapter>,
    base: Option<&Checkpoint>,
    output: &Path,
    options: &Options,
    task: &Task,
) -> Result<Report> {
    let target = Target::of(&options.to)?;
    let format = format::named(target.name).ok_or_else(|| unknown_format(&options.to))?;
    let dtype = options.dtype.as_deref().filter(|name| *name != "auto").map(element_type);
    let dtype = dtype.transpose()?;
    let is_plain = match options.algorithm.as_deref() {
        None | Some("auto") => false,
        Some("lora") => true,
        Some(other) => {
            return Err(Error::Argument(format!(
                "unknown algorithm {other:?}; there is lora, for plain factors of whatever can be \
                 written so"
            )));
        }
    };
    check_output(output, target, options.overwrite)?;
    let leaves_magnitudes = !target.holds.magnitude
        && adapter.modules().values().any(|module| module.magnitudes().is_some());
    let names = base.and_then(DiffusionNames::of);
    let resolved = match base {
        Some(base) => grammar::resolve(adapter, base)?,
        None => None,
    };
    let named = resolved.as_ref().unwrap_or(adapter);
    let of_parameters = experts::resolved(named);
    let named = of_parameters.as_ref().unwrap_or(named);
    let places = Places::of(named, target, names.as_ref())?;
    let mut lost = targets::left_out(adapter, target);
    lost.extend(places.left_out(target));
    if !lost.is_empty() && !options.lossy {
        return Err(Error::unsupported(
            adapter.path(),
            format!(
                "holds what the format {} has no place for: {}; convert with lossy to leave that out",
                target.name,
                lost.join("; ")
            ),
        ));
    }
    let kept = named.modules().values().filter(|module| places.has(module));
    let reduced: Vec<Module> = kept.filter_map(|module| target.reduced(module)).collect();
    if reduced.is_empty() && adapter.saved().is_empty() {
        return Err(Error::unsupported(
            adapter.path(),
            format!("holds nothing that the format {} has a place for", target.name),
        ));
    }
    let mut prepared = Vec::with_capacity(reduced.len());
    let mut of_experts = Vec::new();
    for module in &reduced {
        task.check()?;
        if experts::is_of_experts(module, target) {
            of_experts.push(module);
            continue;
        }
        prepared.push(match target.factors {
            Factors::Any if !is_plain => modules::product(module, adapter.path())?,
            // Norms and biases have no factors, plain or other.
            _ if target.keeps(module) && (!is_plain || modules::is_vector(module)) => {
                module.clone()
            }
            _ => modules::plain(module, adapter.path())?,
        });
    }
    let mut converted = match (&names, base) {
        (Some(names), Some(base)) => {
            let naming = |path: &str| target.naming(names, path);
            modules::renamed(prepared.iter(), names, base, &naming, adapter.path())?
        }
        _ => modules::unchanged(prepared.iter()),
    };
    converted.extend(experts::converted(&of_experts, named, base, target)?);
    if let (Factors::Methods, Some(base)) = (target.factors, base) {
        methods::with_kernels(&mut converted, base, names.as_ref())?;
    }
    let mut pieces = target.pieces(named, converted, names.as_ref())?;
    let mut notes = adapter.notes().to_vec();
    if target.factors == Factors::Methods {
        for piece in &mut pieces {
            notes.extend(methods::settled(&mut piece.converted, base.is_some(), adapter.path())?);
        }
    }
    let written = Staged::new(output, target)?;
    let on_base = base.map(|base| OnBase::new(base, adapter.clone()));
    let mut max_error = 0.0f64;
    let mut apart = None;
    let mut count = 0;
    for piece in &pieces {
        task.check()?;
        let value = adapter_of(named, piece, target);
        let path = written.path(piece.folder.as_deref());
        let write = WriteOptions { base, dtype: dtype.clone() };
        format.write(&value, &path, &write)?;
        let back = Arc::new(AdapterSource::at(&path).open_for(base, task)?);
        if back.format() != target.name && !target.also_reads_as(back.format()) {
            return Err(Error::adapter(
                adapter.path(),
                format!("was written as {} and reads as {}", target.name, back.format()),
            ));
        }
        if back.format() != target.name {
            notes.push(format!(
                "nothing in it is named otherwise than in {}'s format, as which it is read",
                back.format()
            ));
        }
        let of_parameters = experts::resolved(&back);
        let found = by_name(of_parameters.as_ref().unwrap_or(&back));
        let compared = modules::as_read(&piece.converted, &found);
        let of_base = on_base.as_ref().map(|on_base| {
            |keys: &HashSet<&str>| {
                let placed = in_folder(&back, piece.folder.as_deref());
                on_base.errors(placed.unwrap_or_else(|| back.clone()), keys, task)
            }
        });
        let of_base = of_base.as_ref().map(|of_base| of_base as &difference::OnBaseOf<'_>);
        let difference = difference::largest(named, &compared, &found, of_base, task)?;
        max_error = max_error.max(difference.largest);
        apart = apart.or(difference.apart);
        count += piece.converted.len();
    }
    adapter.file().check_unchanged()?;
    let files = written.commit(!options.unsynced)?;
    notes.extend(targets::notes(adapter, target));
    let is_told = !leaves_magnitudes || apart.is_none();
    if let Some(reason) = apart.filter(|_| !leaves_magnitudes) {
        notes.push(format!(
            "max_error counts DoRA's magnitudes and the products beside them apart: {reason}"
        ));
    }
    lost.extend(targets::metadata_left_out(adapter, target));
    Ok(Report {
        source_format: adapter.format(),
        target_format: target.name,
        modules: count,
        max_error: is_told.then_some(max_error),
        lost,
        notes,
        files,
    })
}

fn unknown_format(name: &str) -> Error {
    Error::Argument(format!(
        "adapters cannot be written in the format {name:?}; there are {}",
        targets::names().join(", ")
    ))
}

/// The element type of that name, for factors.
///
/// # Errors
/// [`Error::Argument`] for another.
pub(crate) fn element_type(name: &str) -> Result<Dtype> {
    let known = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F64];
    known.into_iter().find(|dtype| dtype.torch_name() == Some(name)).ok_or_else(|| {
        Error::Argument(format!(
            "unknown dtype {name:?}; there are auto, float32, float16, bfloat16 and float64"
        ))
    })
}

/// The adapter that one piece of a conversion is.
fn adapter_of(source: &Adapter, piece: &Piece, target: &Target) -> Adapter {
    let modules: IndexMap<String, Module> = (piece.converted.iter())
        .map(|Converted { module, .. }| (module.key.clone(), module.clone()))
        .collect();
    let grammar = if target.is_flattened { Grammar::Flattened } else { Grammar::Dotted };
    let (saved, rows) = match target.holds.whole {
        true => (source.saved().to_vec(), source.trained_rows().to_vec()),
        false => (Vec::new(), Vec::new()),
    };
    source.renamed(modules, saved, rows, grammar).rewritten()
}

/// An adapter that lies in a component's folder, under names that begin with the component.
fn in_folder(adapter: &Adapter, folder: Option<&str>) -> Option<Arc<Adapter>> {
    let folder = folder?;
    let placed = |(key, module): (&String, &Module)| {
        (key.clone(), Module { path: format!("{folder}.{}", module.path), ..module.clone() })
    };
    let modules = adapter.modules().iter().map(placed).collect();
    let (saved, rows) = (adapter.saved().to_vec(), adapter.trained_rows().to_vec());
    Some(Arc::new(adapter.renamed(modules, saved, rows, adapter.grammar())))
}

/// The modules of a written adapter by their keys, and by their paths where no key is so.
fn by_name(adapter: &Adapter) -> HashMap<String, Module> {
    let mut found = HashMap::new();
    for module in adapter.modules().values() {
        found.insert(module.title().into_owned(), module.clone());
        if let Some(parameter) = module.only_parameter() {
            found.insert(format!("{}.{}", module.path, parameter.name), module.clone());
        }
    }
    for (key, module) in adapter.modules() {
        found.insert(key.clone(), module.clone());
    }
    found
}

/// Refuses to write where something is, unless that may be replaced.
fn check_output(output: &Path, target: &Target, overwrite: bool) -> Result<()> {
    let refused = |message: String| Err(Error::Output { path: output.to_path_buf(), message });
    let is_there = local::find(output)?.is_some();
    let is_directory = is_there && local::is_directory(output);
    if is_there && is_directory != target.is_directory {
        let (is, wants) = match target.is_directory {
            true => ("a file", "a directory"),
            false => ("a directory", "a file"),
        };
        return refused(format!(
            "is {is}, and an adapter in the format {} is {wants}",
            target.name
        ));
    }
    // Nothing would read it under another name.
    let is_safetensors = !target.is_directory && target.name != "gguf";
    if is_safetensors && output.extension().is_none_or(|ending| ending != "safetensors") {
        return refused(format!(
            "an adapter in the format {} is a safetensors file; give it a name that ends in .safetensors",
            target.name
        ));
    }
    let is_empty = is_directory && local::paths_in(output)?.is_empty();
    if !is_there || overwrite || is_empty {
        return Ok(());
    }
    refused("is there already; pass overwrite to replace it".to_owned())
}

/// What is written beside the output, and moved to it at the end.
struct Staged<'a> {
    output: &'a Path,
    place: PathBuf,
    is_directory: bool,
}

impl<'a> Staged<'a> {
    fn new(output: &'a Path, target: &Target) -> Result<Self> {
        let mut name = std::ffi::OsString::from(".");
        name.push(output.file_name().unwrap_or_default());
        name.push(format!(".{}.partial", std::process::id()));
        let place = output.with_file_name(name);
        local::create_directories(&place)?;
        Ok(Self { output, place, is_directory: target.is_directory })
    }

    /// Where a piece is written.
    fn path(&self, folder: Option<&str>) -> PathBuf {
        let inner = self.place.join(self.output.file_name().unwrap_or_default());
        folder.map_or_else(|| inner.clone(), |folder| inner.join(folder))
    }

    /// Moves everything to the output.
    fn commit(self, is_synced: bool) -> Result<Vec<PathBuf>> {
        let from = self.path(None);
        let mut files = Vec::new();
        if self.is_directory {
            move_into(&from, self.output, is_synced, &mut files)?;
        } else {
            if is_synced {
                local::sync_file(&from)?;
            }
            local::rename(&from, self.output)?;
            files.push(self.output.to_path_buf());
        }
        Ok(files)
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        local::remove_all(&self.place);
    }
}

fn move_into(from: &Path, to: &Path, is_synced: bool, files: &mut Vec<PathBuf>) -> Result<()> {
    local::create_directories(to)?;
    let mut found = local::paths_in(from)?;
    found.sort();
    for path in found {
        let target = to.join(path.file_name().unwrap_or_default());
        if local::is_directory(&path) {
            move_into(&path, &target, is_synced, files)?;
        } else {
            if is_synced {
                local::sync_file(&path)?;
            }
            local::rename(&path, &target)?;
            files.push(target);
        }
    }
    Ok(())
}
