//! PEFT's LoHa, LoKr, IA3 and OFT: files of the same kind as its LoRA, whose tensors are a module's parts as
//! LyCORIS names them.

use std::sync::Arc;

use indexmap::IndexMap;

use super::config::{Method, PeftConfig, Rotation};
use super::key_names::{Key, KeyReader, NamedPath};
use super::keys::Sorted;
use crate::adapter::deltas::{RotatedInputs, Scaled};
use crate::adapter::formats::parts::{self, DefaultScale, ModuleParts, Part, ScaleRule};
use crate::adapter::{Delta, LayerKind, Module, Role, Saved};
use crate::checkpoint::names::wrappers::Wrappers;
use crate::error::{Error, Result, with_article};
use crate::limits;
use crate::parallel::task::Task;
use crate::tensor::safetensors::{Tensor, TensorFile};

/// What stands after a part's name in a state dict, where the adapter has the usual name.
const DEFAULT: &str = ".default";

/// The tensors of one module, and the names that the config knows it by.
#[derive(Default)]
struct Found {
    path: Option<NamedPath>,
    parts: ModuleParts,
}

/// Puts every tensor in its place, and makes the modules by the config's method.
pub(super) fn sort(
    file: &Arc<TensorFile>,
    config: &PeftConfig,
    wrappers: Wrappers<'_>,
    task: &Task,
) -> Result<Sorted> {
    let broken = |message: String| Error::adapter(file.path(), message);
    let names = file.header().tensors.iter().map(|tensor| tensor.name.as_str());
    let mut reader = KeyReader::new(wrappers, names).map_err(broken)?;
    let mut all = IndexMap::<String, Found>::new();
    let (mut saved, mut others) = (Vec::<Saved>::new(), Vec::new());
    for info in &file.header().tensors {
        task.check()?;
        let tensor = Tensor::new(file.clone(), info.clone());
        let path = match reader.read(&tensor.name) {
            Key::Saved(path) | Key::Rows(path) => path,
            Key::Other(role) => {
                others.push((tensor.name.clone(), role));
                continue;
            }
            Key::Module { .. } => return Err(stranger(&tensor, config.method())),
        };
        let bare = |path: &str| path.strip_suffix(DEFAULT).unwrap_or(path).to_owned();
        let NamedPath { path, written } = path;
        let (name, written) = (bare(&path), bare(&written));
        match parts::split(&name).filter(|(_, part, _)| is_of(*part, config.method())) {
            Some((module, part, _)) => {
                let written = parts::split(&written).map_or(&*written, |(module, ..)| module);
                let found = all.entry(module.to_owned()).or_default();
                let (path, written) = (module.to_owned(), written.to_owned());
                found.path.get_or_insert(NamedPath { path, written });
                found.parts.add(part, tensor)?;
            }
            None => match parts::split(&name) {
                Some((_, part, _)) if part != Part::Weight && !config.saves_module_of(&path) => {
                    return Err(stranger(&tensor, config.method()));
                }
                _ => {
                    let trained_apart = config.saves_module_of(&path);
                    match saved.iter().find(|other| other.path == path) {
                        Some(other) if other.tensor.has_same_bytes(&tensor)? => {
                            others.push((tensor.name.clone(), Role::Repeated));
                        }
                        Some(other) => {
                            return Err(broken(format!(
                                "tensors {} and {} differ, but both are the parameter {path}",
                                other.tensor.name, tensor.name
                            )));
                        }
                        None => saved.push(Saved { path, tensor, trained_apart }),
                    }
                }
            },
        }
    }
    if file.header().tensors.is_empty() {
        return Err(broken("holds no tensors".into()));
    }
    let mut modules = IndexMap::with_capacity(all.len());
    for (key, Found { path, parts }) in all {
        task.check()?;
        let path = path.expect("set with the first part");
        for module in modules_of(&key, &path, parts, config)? {
            modules.insert(module.key.clone(), module);
        }
    }
    Ok(Sorted { modules, saved, rows: Vec::new(), others, notes: reader.notes() })
}

/// Whether a part is one of that method's.
fn is_of(part: Part, method: Method) -> bool {
    match part {
        Part::Hadamard(_) => method == Method::Loha,
        Part::Kronecker(_) => method == Method::Lokr,
        Part::Ia3 => method == Method::Ia3,
        Part::OrthogonalElements | Part::EmbeddingElements => method == Method::Oft,
        _ => false,
    }
}

fn stranger(tensor: &Tensor, method: Method) -> Error {
    let method = with_article(method.name());
    let message =
        format!("holds {}, which is no part of {method}, as its config says", tensor.name);
    Error::unsupported(tensor.file().path(), message)
}

fn modules_of(
    key: &str,
    path: &NamedPath,
    parts: ModuleParts,
    config: &PeftConfig,
) -> Result<Vec<Module>> {
    let NamedPath { path, written } = path;
    if config.method() == Method::Ia3 {
        let vector = parts.get(Part::Ia3).expect("the only part of this method").clone();
        return scaled(key, path, written, vector, config).map(|module| vec![module]);
    }
    if let Some(rotation) = config.rotation() {
        let (part, elements) = parts.tensors().first().expect("a module has a part").clone();
        let of_embedding = part == Part::EmbeddingElements;
        return rotated(key, path, elements, rotation, of_embedding).map(|module| vec![module]);
    }
    let (rank, alpha) = (config.rank_of(path, written)?, config.alpha_of(path, written)?);
    let stored = parts.tensors().iter().find_map(|(part, tensor)| {
        parts::tells_rank(*part).then(|| (tensor.shape.first().copied(), tensor.name.clone()))
    });
    if let Some((Some(stored), name)) = stored
        && stored != rank
    {
        return Err(Error::adapter(
            config.path(),
            format!(
                "gives the module {path} rank {rank} (r or rank_pattern), but {name} has rank {stored}; \
                 the weights and the config do not belong together"
            ),
        ));
    }
    let scaling = config.scaling(alpha, rank);
    let rule =
        ScaleRule { default: DefaultScale::Factor { scaling, alpha }, scales_whole_factors: true };
    let mut modules = parts.module(key, path, &rule)?;
    modules.iter_mut().for_each(|module| module.rank = rank);
    Ok(modules)
}

/// IA3, whose vectors are (1, in) of the feed-forward layers and (out, 1) of the others; of
/// convolutions (1, in, 1…) and (1, out, 1…), so that the config has to tell.
fn scaled(
    key: &str,
    path: &str,
    written: &str,
    vector: Tensor,
    config: &PeftConfig,
) -> Result<Module> {
    let count = vector.elements();
    let wide = vector.shape.iter().filter(|extent| **extent != 1).count();
    if count == 0 || wide > 1 || !vector.dtype.is_mergeable() {
        return Err(Error::adapter(
            vector.file().path(),
            format!(
                "{} of type {} and shape {:?} is no vector of an IA3 adapter",
                vector.name, vector.dtype, vector.shape
            ),
        ));
    }
    let on_input = match vector.shape.as_slice() {
        [1, other] if *other != 1 => true,
        [other, 1] if *other != 1 => false,
        _ => config.is_feedforward(path, written)?,
    };
    let kind = if vector.shape.len() > 2 { LayerKind::Convolution } else { LayerKind::Linear };
    let delta: Arc<dyn Delta> =
        Arc::new(Scaled { vector, on_input, less_one: false, with_bias: !on_input, flag: None });
    Ok(without_scale(key, path, kind, delta))
}

/// OFT, whose blocks are given by what stands above their diagonals.
fn rotated(
    key: &str,
    path: &str,
    elements: Tensor,
    Rotation { shared, bound, cayley }: Rotation,
    of_embedding: bool,
) -> Result<Module> {
    // b·(b − 1)/2 of b rows.
    let extent = match *elements.shape.as_slice() {
        [count, above @ 1..=limits::EXPANDED] if count > 0 && (count == 1 || !shared) => {
            let extent = (1 + 8 * above).isqrt().div_ceil(2);
            (extent * (extent - 1) / 2 == above && extent <= limits::RANK).then_some(extent)
        }
        _ => None,
    };
    let Some(extent) = extent.filter(|_| elements.dtype.is_mergeable()) else {
        return Err(Error::adapter(
            elements.file().path(),
            format!(
                "{} of type {} and shape {:?} holds no skew-symmetric blocks, each row b·(b − 1)/2 \
                 elements of one",
                elements.name, elements.dtype, elements.shape
            ),
        ));
    };
    let kind = if of_embedding { LayerKind::Embedding } else { LayerKind::Linear };
    let delta: Arc<dyn Delta> =
        Arc::new(RotatedInputs { elements, extent, shared, of_embedding, bound, cayley });
    Ok(Module { rank: extent, ..without_scale(key, path, kind, delta) })
}

/// A module of what has neither a rank nor a scale.
fn without_scale(key: &str, path: &str, kind: LayerKind, delta: Arc<dyn Delta>) -> Module {
    Module {
        key: key.to_owned(),
        path: path.to_owned(),
        parameters: Vec::new(),
        kind,
        delta,
        scale: None,
        magnitude: None,
        bias: None,
        rank: 1,
        alpha: 1.0,
        scaling: 1.0,
    }
}
