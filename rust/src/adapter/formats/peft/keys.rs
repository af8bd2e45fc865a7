//! From the keys of an adapter's file to the parts that its tensors play.

use indexmap::IndexMap;

use std::sync::Arc;

use super::config::PeftConfig;
use super::key_names::{Key, KeyReader, NamedPath, Part};
use crate::adapter::deltas::{BlockDiagonal, Experts, Grouped, LowRank, SharedReads};
use crate::adapter::expert_factors::{self, Stack};
use crate::adapter::{Delta, LayerKind, Module, Parameter, Role, Saved, TrainedRows, foreign};
use crate::checkpoint::names::wrappers::Wrappers;
use crate::error::{Error, Result};
use crate::limits;
use crate::parallel::task::Task;
use crate::tensor::safetensors::{Tensor, TensorFile, TensorInfo};

/// Every tensor of a file in its place.
pub(super) struct Sorted {
    pub modules: IndexMap<String, Module>,
    pub saved: Vec<Saved>,
    pub rows: Vec<TrainedRows>,
    pub others: Vec<(String, Role)>,
    /// What was left out of names.
    pub notes: Vec<String>,
}

/// The tensors of one module, as they are found.
#[derive(Default)]
struct Parts {
    path: Option<NamedPath>,
    embedding: bool,
    a: Option<Tensor>,
    b: Option<Tensor>,
    magnitude: Option<Tensor>,
    bias: Option<Tensor>,
    diagonal: Option<Tensor>,
}

/// Puts every tensor in its place, pairs the factors up and checks each pair against the config.
pub(super) fn sort(
    file: &Arc<TensorFile>,
    config: &PeftConfig,
    wrappers: Wrappers<'_>,
    task: &Task,
) -> Result<Sorted> {
    let mut all = IndexMap::<String, Parts>::new();
    let mut saved = IndexMap::<String, Saved>::new();
    let mut rows = IndexMap::<String, TrainedRows>::new();
    let mut others = Vec::new();
    let broken = |message: String| Error::adapter(file.path(), message);
    let names = file.header().tensors.iter().map(|tensor| tensor.name.as_str());
    let mut reader = KeyReader::new(wrappers, names).map_err(broken)?;
    for info in &file.header().tensors {
        task.check()?;
        let tensor = &Tensor::new(file.clone(), info.clone());
        let (module, path, part) = match reader.read(&tensor.name) {
            Key::Module { key, path, part } => (key, path, part),
            Key::Saved(path) => {
                match saved.get(&path.path) {
                    None => {
                        if let Some(what) = foreign::part_by_key(&tensor.name)
                            .filter(|_| !config.saves_module_of(&path.path))
                        {
                            return Err(Error::unsupported(
                                file.path(),
                                format!("holds {}, {what}; it is not read yet", tensor.name),
                            ));
                        }
                        let trained_apart = config.saves_module_of(&path.path)
                            || config.saves_module_of(&path.written);
                        let (path, tensor) = (path.path, tensor.clone());
                        saved.insert(path.clone(), Saved { path, tensor, trained_apart });
                    }
                    // PEFT writes the biases of saved modules twice under bias = "all".
                    Some(Saved { tensor: other, .. }) if is_repeated(other, tensor)? => {
                        others.push((tensor.name.clone(), Role::Repeated));
                    }
                    Some(Saved { path, tensor: other, .. }) => {
                        return Err(broken(format!(
                            "tensors {} and {} differ, but both are the parameter {path}",
                            other.name, tensor.name
                        )));
                    }
                }
                continue;
            }
            Key::Rows(path) => {
                let new = trained_rows(path, tensor, config).map_err(broken)?;
                if let Some(other) = rows.get(&new.path) {
                    return Err(broken(format!(
                        "tensors {} and {} are both the trained rows of {}",
                        other.tensor.name, tensor.name, new.path
                    )));
                }
                rows.insert(new.path.clone(), new);
                continue;
            }
            Key::Other(role) => {
                others.push((tensor.name.clone(), role));
                continue;
            }
        };
        if !tensor.dtype.is_mergeable() {
            return Err(broken(format!(
                "tensor {} has the type {}; a factor is of a floating-point type",
                tensor.name, tensor.dtype
            )));
        }
        // tinker's, of a model whose experts have two matrices.
        if tensor.elements() == 0 && path.path.contains(".experts.w") {
            others.push((tensor.name.clone(), Role::Empty));
            continue;
        }
        let parts = all.entry(module).or_default();
        let path = &*parts.path.get_or_insert(path);
        parts.embedding |= matches!(part, Part::EmbeddingA | Part::EmbeddingB);
        let slot = match part {
            Part::A | Part::EmbeddingA => &mut parts.a,
            Part::B | Part::EmbeddingB => &mut parts.b,
            Part::Magnitude => &mut parts.magnitude,
            Part::Bias => &mut parts.bias,
            Part::Diagonal => &mut parts.diagonal,
        };
        if let Some(other) = slot.replace(tensor.clone()) {
            return Err(broken(format!(
                "tensors {} and {} are the same part of one module, {}; keep the one that was meant",
                other.name, tensor.name, path.path
            )));
        }
    }
    let mut modules = IndexMap::with_capacity(all.len());
    let shared = Arc::new(SharedReads::default());
    for (key, parts) in all {
        task.check()?;
        let module = assemble(&key, parts, config, file, &shared)?;
        modules.insert(key, module);
    }
    if file.header().tensors.is_empty() {
        return Err(broken("holds no tensors".into()));
    }
    let (saved, rows) = (saved.into_values().collect(), rows.into_values().collect());
    Ok(Sorted { modules, saved, rows, others, notes: reader.notes() })
}

fn trained_rows(
    path: NamedPath,
    tensor: &Tensor,
    config: &PeftConfig,
) -> Result<TrainedRows, String> {
    let name = &tensor.name;
    let NamedPath { path, written } = path;
    let rows = config
        .features()
        .tokens
        .as_ref()
        .and_then(|tokens| tokens.rows_of(&path).or_else(|| tokens.rows_of(&written)));
    let Some(rows) = rows else {
        return Err(format!(
            "has {name}, but trainable_token_indices in its config does not say which rows they are"
        ));
    };
    if !tensor.dtype.is_mergeable() {
        return Err(format!(
            "{name} has the type {}; trained rows are of a floating-point type",
            tensor.dtype
        ));
    }
    if tensor.shape.len() != 2 || tensor.shape[0] != rows.len() as u64 {
        return Err(format!(
            "{name} has shape {:?}, but trainable_token_indices in its config names {} tokens",
            tensor.shape,
            rows.len()
        ));
    }
    Ok(TrainedRows { path, rows: rows.to_vec(), tensor: tensor.clone() })
}

fn is_repeated(first: &Tensor, second: &Tensor) -> Result<bool> {
    let alike = first.dtype == second.dtype && first.shape == second.shape;
    Ok(alike && first.has_same_bytes(second)?)
}

fn assemble(
    key: &str,
    parts: Parts,
    config: &PeftConfig,
    file: &TensorFile,
    shared: &Arc<SharedReads>,
) -> Result<Module> {
    let broken = |message: String| Error::adapter(file.path(), message);
    let Parts { path, embedding, a, b, magnitude, bias, diagonal } = parts;
    let (a, b) = match (a, b) {
        (Some(a), Some(b)) => (a, b),
        (Some(a), None) => return Err(broken(format!("has {} but not its lora_B", a.name))),
        (None, Some(b)) => return Err(broken(format!("has {} but not its lora_A", b.name))),
        (None, None) => {
            return Err(broken(format!("has parts of the module {key} but not its factors")));
        }
    };
    let Some(known_as) = path else {
        return Err(broken(format!("has the module {key} without a path")));
    };
    let path = known_as.path.clone();
    let features = config.features();
    let parameters = match embedding {
        false => parameters_of(&known_as, config)?,
        true => Vec::new(),
    };
    if !embedding && features.enabled_parts.is_none() {
        let rank = config.rank_of(&known_as.path, &known_as.written)?;
        let known = (!config.is_missing()).then_some(rank);
        if let Some(stack) = Stack::of(&a.shape, &b.shape, known) {
            if let Some(extra) = [&magnitude, &bias, &diagonal].into_iter().flatten().next() {
                return Err(broken(format!(
                    "has {} beside the factors of {} experts, {} and {}, to which none belongs",
                    extra.name, stack.count, a.name, b.name
                )));
            }
            let delta = stack.delta(a, b, shared).map_err(broken)?;
            let alpha = config.alpha_of(&known_as.path, &known_as.written)?;
            let scaling = config.scaling(alpha, stack.rank);
            return Ok(expert_factors::module(key.to_owned(), &path, delta, stack.rank, scaling));
        }
        if let Some(stack) = Stack::of(&a.shape, &b.shape, None) {
            return Err(broken(format!(
                "{} of shape {:?} and {} of shape {:?} are factors of {} experts of rank {}, but the \
                 config gives this module rank {rank} (r or rank_pattern); the weights and the \
                 config do not belong together",
                a.name, a.shape, b.name, b.shape, stack.count, stack.rank
            )));
        }
        let is_plain = parameters.is_empty() && features.block_diagonal.is_none();
        if let Some(found) = foreign::transposed(&a, &b, rank).filter(|_| is_plain) {
            return Err(Error::unsupported(file.path(), found));
        }
    }
    let parts = features.enabled_parts.as_ref().filter(|_| a.shape.len() == 2 && !embedding);
    if a.shape.len() < 2 || b.shape.len() != a.shape.len() + usize::from(parts.is_some()) {
        return Err(broken(format!(
            "{} of shape {:?} and {} of shape {:?} are no pair of factors",
            a.name, a.shape, b.name, b.shape
        )));
    }
    if a.shape[0] == 0 {
        return Err(broken(format!("{} has rank 0", a.name)));
    }
    if b.shape[2..].iter().any(|extent| *extent != 1) {
        return Err(broken(format!("{} has shape {:?}; its kernel must be 1", b.name, b.shape)));
    }
    let (named, expected) = expected_rank(&known_as, &parameters, a.shape[0], config)?;
    let form = match parts {
        Some(parts) => Form::Parts(parts.clone()),
        None if a.shape[0] != expected && !parameters.is_empty() => Form::Experts,
        None => block_form(&path, config).map_err(broken)?,
    };
    check_rank(&form, (&a, &b), expected).map_err(broken)?;
    if form == Form::Experts && a.shape[0] / expected > limits::EXPERTS {
        return Err(broken(format!(
            "{} of shape {:?} holds the factors of {} experts; there can be {}",
            a.name,
            a.shape,
            a.shape[0] / expected,
            limits::EXPERTS
        )));
    }
    if !config.is_missing() && config.uses_dora() != magnitude.is_some() {
        return Err(broken(match magnitude {
            Some(magnitude) => {
                format!("has the magnitude {} but its config does not set use_dora", magnitude.name)
            }
            None => format!("sets use_dora in its config but has no magnitude for {path}"),
        }));
    }
    // Embeddings have no biases, whatever the config says.
    if !config.is_missing() && !embedding && config.has_lora_bias() != bias.is_some() {
        return Err(broken(match bias {
            Some(bias) => format!("has {} but its config does not set lora_bias", bias.name),
            None => format!("sets lora_bias in its config but has no bias of lora_B for {path}"),
        }));
    }
    if features.kasa != diagonal.is_some() {
        return Err(broken(match diagonal {
            Some(diagonal) => {
                format!("has {} but its config sets no kasa_config", diagonal.name)
            }
            None => format!("sets kasa_config in its config but has no lora_diag for {path}"),
        }));
    }
    let kind = match (embedding, a.shape.len()) {
        (true, _) => LayerKind::Embedding,
        (false, 2) => LayerKind::Linear,
        (false, _) => LayerKind::Convolution,
    };
    let mut alpha = config.alpha_of(&named.path, &named.written)?;
    let scaling = config.scaling(alpha, expected);
    if config.is_missing() {
        alpha = scaling * expected as f64;
    }
    if let (Some(diagonal), true) = (&diagonal, form != Form::Plain) {
        return Err(broken(format!(
            "has {} between factors that are no plain pair of matrices",
            diagonal.name
        )));
    }
    if let Some(diagonal) = diagonal.as_ref().filter(|one| one.elements() != expected) {
        return Err(broken(format!(
            "{} has shape {:?} but its module has rank {expected}",
            diagonal.name, diagonal.shape
        )));
    }
    let delta: Arc<dyn Delta> = match form {
        Form::Plain => Arc::new(LowRank { a, b, diagonal }),
        Form::Experts => Arc::new(Experts { a, b, shared: shared.clone() }),
        Form::BlocksOfA(blocks) => Arc::new(BlockDiagonal { a, b, blocks, is_b: false }),
        Form::BlocksOfB(blocks) => Arc::new(BlockDiagonal { a, b, blocks, is_b: true }),
        Form::Parts(enabled) => Arc::new(Grouped { a, b, enabled }),
    };
    let key = key.to_owned();
    let rank = expected;
    let module = Module {
        key,
        path,
        parameters,
        kind,
        delta,
        scale: None,
        magnitude,
        bias,
        rank,
        alpha,
        scaling,
    };
    for vector in [&module.magnitude, &module.bias].into_iter().flatten() {
        if vector.elements() != module.outputs() {
            return Err(broken(format!(
                "{} has shape {:?} but its module has {} outputs",
                vector.name,
                vector.shape,
                module.outputs()
            )));
        }
    }
    Ok(module)
}

/// The path under which the config's patterns know a module, and the rank they give it. Patterns
/// know a parameter by its own name; which of several it is, only the base can tell, so that this
/// is the first whose rank fits.
fn expected_rank(
    path: &NamedPath,
    parameters: &[Parameter],
    rows: u64,
    config: &PeftConfig,
) -> Result<(NamedPath, u64)> {
    match parameters.iter().find(|parameter| rows.is_multiple_of(parameter.rank)) {
        Some(parameter) => Ok((path.parameter(&parameter.name), parameter.rank)),
        None if config.is_missing() => Ok((path.clone(), rows)),
        None => Ok((path.clone(), config.rank_of(&path.path, &path.written)?)),
    }
}

/// The parameters that a module's factors may belong to, with the rank and the scale that the
/// config gives each.
fn parameters_of(path: &NamedPath, config: &PeftConfig) -> Result<Vec<Parameter>> {
    let of_module = |path: &str| {
        let names = config.features().target_parameters.of_module(path);
        names.map_err(|message| Error::adapter(config.path(), message))
    };
    let mut names = of_module(&path.path)?;
    if names.is_empty() && path.written != path.path {
        names = of_module(&path.written)?;
    }
    let parameter = |name: &str| {
        let NamedPath { path, written } = path.parameter(name);
        let rank = config.rank_of(&path, &written)?;
        let scaling = config.scaling(config.alpha_of(&path, &written)?, rank);
        Ok(Parameter { name: name.to_owned(), rank, scaling })
    };
    names.into_iter().map(parameter).collect()
}

/// How the two factors of a module are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Form {
    /// They are A and B.
    Plain,
    /// They hold those of all experts of one parameter (`target_parameters`).
    Experts,
    /// A is block-diagonal; its blocks lie below one another (r, in/n).
    BlocksOfA(u64),
    /// B is block-diagonal; its blocks lie below one another (out, r/n).
    BlocksOfB(u64),
    /// The outputs are equal parts, of which these have factors.
    Parts(Vec<bool>),
}

fn block_form(path: &str, config: &PeftConfig) -> Result<Form, String> {
    let Some(blocks) = &config.features().block_diagonal else { return Ok(Form::Plain) };
    match (blocks.has_a(path), blocks.has_b(path)) {
        (false, false) => Ok(Form::Plain),
        (true, false) => Ok(Form::BlocksOfA(blocks.blocks)),
        (false, true) => Ok(Form::BlocksOfB(blocks.blocks)),
        (true, true) => Err(format!(
            "its module {path} is among both target_modules_bd_a and target_modules_bd_b"
        )),
    }
}

/// Whether the factors' shapes are those of a module of that rank in that form.
fn check_rank(form: &Form, (a, b): (&TensorInfo, &TensorInfo), rank: u64) -> Result<(), String> {
    let (rows, columns) = (a.shape[0], b.shape[1]);
    let fit = match form {
        Form::Plain | Form::BlocksOfA(_) => rows == columns,
        Form::BlocksOfB(blocks) => Some(rows) == columns.checked_mul(*blocks),
        Form::Experts => rows == columns && rows.is_multiple_of(rank),
        // A convolution in groups: each group of B's rows reads its own rows of A.
        Form::Parts(_) => rows.is_multiple_of(columns) && b.shape[0].is_multiple_of(rows / columns),
    };
    if !fit {
        return Err(format!("{} has rank {rows} but {} has rank {columns}", a.name, b.name));
    }
    let expected = match form {
        Form::Experts => return Ok(()),
        Form::Parts(parts) => rank * parts.iter().filter(|enabled| **enabled).count() as u64,
        _ => rank,
    };
    if rows != expected {
        return Err(format!(
            "{} has rank {rows} but the config gives this module rank {expected} \
             (r or rank_pattern); the weights and the config do not belong together",
            a.name
        ));
    }
    let divided = match form {
        Form::BlocksOfA(blocks) => rows.is_multiple_of(*blocks),
        Form::BlocksOfB(blocks) => b.shape[0].is_multiple_of(*blocks),
        Form::Parts(parts) => {
            b.shape[0].is_multiple_of(parts.iter().filter(|enabled| **enabled).count() as u64)
        }
        Form::Plain | Form::Experts => true,
    };
    match divided {
        true => Ok(()),
        false => Err(format!(
            "{} of shape {:?} and {} of shape {:?} cannot be cut into the config's blocks",
            a.name, a.shape, b.name, b.shape
        )),
    }
}
