//! An adapter written as PEFT's: its own file and config where it was read from these, else a
//! config made from its modules.

use std::path::Path;

use indexmap::IndexMap;
use serde_json::{Map, Value, json};

use super::config::Method;
use super::methods::{self, Laid};
use super::{WEIGHTS, config, key_names};
use crate::adapter::deltas::transposed;
use crate::adapter::factors::Pair;
use crate::adapter::format::WriteOptions;
use crate::adapter::{Adapter, Grammar, Initialization, LayerKind, Module};
use crate::error::{Error, Result};
use crate::storage::local;
use crate::tensor::safetensors::{Tensor, write};

pub(super) fn write_adapter(
    adapter: &Adapter,
    directory: &Path,
    options: &WriteOptions<'_>,
) -> Result<()> {
    let (config, mut tensors): (_, Vec<_>) = if adapter.format() == "peft" {
        let all = adapter.file().header().tensors.iter();
        let tensors =
            all.map(|info| (info.name.clone(), Tensor::new(adapter.file().clone(), info.clone())));
        (adapter.settings().clone(), tensors.collect())
    } else {
        check(adapter)?;
        let laid = methods::laid_out(adapter.modules().values(), options.base.is_some());
        match laid.map_err(|why| Error::unsupported(adapter.path(), why))? {
            Some(laid) => (config_of_method(adapter, &laid)?, tensors_of_method(adapter, &laid)?),
            None => (config_of(adapter)?, tensors_of(adapter)?),
        }
    };
    for (_, tensor) in &mut tensors {
        *tensor = options.cast(tensor)?;
    }
    local::create_directories(directory)?;
    let metadata = IndexMap::from([("format".to_owned(), "pt".to_owned())]);
    write::write(&directory.join(WEIGHTS), metadata, tensors)?;
    let text = serde_json::to_vec_pretty(&config).expect("plain data");
    local::write_small(&directory.join(config::FILE_NAME), &text)
}

fn refused(adapter: &Adapter, what: &str) -> Error {
    Error::unsupported(adapter.path(), format!("{what}, which PEFT's format cannot say of it"))
}

/// # Errors
/// What the format cannot say of the whole adapter.
fn check(adapter: &Adapter) -> Result<()> {
    if adapter.grammar() != Grammar::Dotted {
        return Err(Error::unsupported(
            adapter.path(),
            "has flattened names, of which only the base tells where the dots were; give the base",
        ));
    }
    let semantics = adapter.semantics();
    if let Some(order) = &semantics.unknown_order {
        return Err(Error::Argument(format!(
            "{}: has rows in {order}; open it with its base",
            adapter.path().display()
        )));
    }
    if semantics.initialization != Initialization::Plain || semantics.layer_replication.is_some() {
        return Err(refused(adapter, "changed the base before it was trained"));
    }
    if !adapter.trained_rows().is_empty() || !adapter.saved().is_empty() {
        return Err(refused(adapter, "brings parameters whole"));
    }
    Ok(())
}

/// Whether one config of PEFT's describes all of the modules, in words if none does: as one method, or
/// as plain factors. What the base tells of kernels is told in the modules where it `knows_kernels`.
///
/// # Errors
/// Why none does.
pub fn check_method<'a>(
    modules: impl Iterator<Item = &'a Module> + Clone,
    knows_kernels: bool,
) -> Result<(), String> {
    methods::laid_out(modules, knows_kernels).map(|_| ())
}

/// The tensors of every module of one of the other methods under PEFT's keys.
fn tensors_of_method(adapter: &Adapter, laid: &Laid) -> Result<Vec<(String, Tensor)>> {
    let mut tensors = Vec::new();
    for (module, own) in adapter.modules().values().zip(&laid.modules) {
        for (ending, tensor) in own.tensors()? {
            tensors.push((key_names::name_of(&module.path, ending), tensor));
        }
    }
    Ok(tensors)
}

/// The tensors of every module under PEFT's keys.
fn tensors_of(adapter: &Adapter) -> Result<Vec<(String, Tensor)>> {
    let mut tensors = Vec::new();
    for module in adapter.modules().values() {
        let Some((a, b)) = factors_of(module)? else {
            let what = format!("adds to {} what is no product of two stored matrices", module.path);
            return Err(refused(adapter, &what));
        };
        let embedding = module.kind == LayerKind::Embedding;
        let [name_a, name_b, magnitude, bias] = key_names::names_of(&module.path, embedding);
        tensors.push((name_a, a));
        tensors.push((name_b, b));
        tensors.extend(module.magnitude.iter().map(|tensor| (magnitude.clone(), tensor.clone())));
        tensors.extend(module.bias.iter().map(|tensor| (bias.clone(), tensor.clone())));
    }
    Ok(tensors)
}

/// The two factors of a module, as they are stored or put together; `None` where there is more than
/// two matrices.
fn factors_of(module: &Module) -> Result<Option<(Tensor, Tensor)>> {
    if let Some((a, b)) = module.delta.plain() {
        return Ok(Some((a.clone(), b.clone())));
    }
    if module.delta.is_by_tokens() {
        // PEFT's embedding is the transpose of its product, and has a magnitude for each column.
        let pair = module.pair(None, None, None)?;
        let is_plain = module.magnitude.is_none() && module.bias.is_none();
        return is_plain.then(|| by_tokens(module, &pair)).transpose();
    }
    if !module.delta.is_low_rank() || module.kind == LayerKind::Convolution {
        return Ok(None);
    }
    let pair = module.pair(None, None, None)?;
    let [rank, inputs, outputs] = [pair.rank, pair.inputs, pair.outputs].map(|each| each as u64);
    let name = Path::new(&module.path);
    let a = Tensor::in_memory(name, "A", pair.a_dtype, vec![rank, inputs], pair.a)?;
    let b = Tensor::in_memory(name, "B", pair.b_dtype, vec![outputs, rank], pair.b)?;
    Ok(Some((a, b)))
}

/// The factors of an embedding whose product is its weight's, as those of the product's transpose.
fn by_tokens(module: &Module, pair: &Pair) -> Result<(Tensor, Tensor)> {
    let [rank, inputs, outputs] = [pair.rank, pair.inputs, pair.outputs].map(|each| each as u64);
    let name = Path::new(&module.path);
    let a = transposed(&pair.b, (pair.outputs, pair.rank), &pair.b_dtype);
    let b = transposed(&pair.a, (pair.rank, pair.inputs), &pair.a_dtype);
    let a = Tensor::in_memory(name, "A", pair.b_dtype.clone(), vec![rank, outputs], a)?;
    let b = Tensor::in_memory(name, "B", pair.a_dtype.clone(), vec![inputs, rank], b)?;
    Ok((a, b))
}

/// The value that most modules have, the first of those.
fn usual<T: PartialEq + Copy>(values: &[T]) -> Option<T> {
    let count = |value: &T| values.iter().filter(|other| *other == value).count();
    let most = values.iter().map(count).max()?;
    values.iter().find(|value| count(value) == most).copied()
}

/// The ranks and alphas of a config.
struct Scales {
    rank: u64,
    alpha: f64,
    rank_pattern: Map<String, Value>,
    alpha_pattern: Map<String, Value>,
}

impl Scales {
    /// Of modules that have these ranks: α/r is their scale, or α/√r, whatever that was made of.
    fn of(modules: &[&Module], ranks: &[u64], stabilized: bool) -> Self {
        let alpha_of = |(module, rank): (&&Module, &u64)| {
            let divisor = if stabilized { (*rank as f64).sqrt() } else { *rank as f64 };
            match module.rank == *rank && module.alpha / divisor == module.scaling {
                true => module.alpha,
                false => module.scaling * divisor,
            }
        };
        let alphas: Vec<f64> = modules.iter().zip(ranks).map(alpha_of).collect();
        let rank = usual(ranks).unwrap_or(1);
        let alpha = usual(&alphas).unwrap_or(rank as f64);
        let mut rank_pattern = Map::new();
        let mut alpha_pattern = Map::new();
        for (module, (own_rank, own)) in modules.iter().zip(ranks.iter().zip(&alphas)) {
            // The keys are expressions; a whole path matches itself alone.
            let key = format!("^{}$", module.path.replace('.', r"\."));
            if *own_rank != rank {
                rank_pattern.insert(key.clone(), (*own_rank).into());
            }
            if *own != alpha {
                alpha_pattern.insert(key, json!(own));
            }
        }
        Self { rank, alpha, rank_pattern, alpha_pattern }
    }
}

fn config_of_method(adapter: &Adapter, laid: &Laid) -> Result<Map<String, Value>> {
    let modules: Vec<&Module> = adapter.modules().values().collect();
    if let Some(module) = modules.iter().find(|module| !module.scaling.is_finite()) {
        return Err(refused(adapter, &format!("tells no scale for {}", module.path)));
    }
    let targets: Vec<&str> = modules.iter().map(|module| module.path.as_str()).collect();
    let mut config = laid.settings.clone();
    let mut set = |field: &str, value: Value| config.insert(field.to_owned(), value);
    set("peft_type", laid.method.name().into());
    set("base_model_name_or_path", json!(adapter.semantics().base));
    set("target_modules", json!(targets));
    set("inference_mode", true.into());
    if laid.method == Method::Ia3 {
        set("init_ia3_weights", true.into());
        set("fan_in_fan_out", adapter.semantics().stored_transposed.into());
        return Ok(config);
    }
    let ranks: Vec<u64> = laid.modules.iter().map(|module| module.rank).collect();
    let Scales { rank, alpha, rank_pattern, alpha_pattern } = Scales::of(&modules, &ranks, false);
    set("r", rank.into());
    set("alpha", json!(alpha));
    set("rank_pattern", rank_pattern.into());
    set("alpha_pattern", alpha_pattern.into());
    set("rank_dropout", json!(0.0));
    set("module_dropout", json!(0.0));
    set("init_weights", true.into());
    Ok(config)
}

fn config_of(adapter: &Adapter) -> Result<Map<String, Value>> {
    let modules: Vec<&Module> = adapter.modules().values().collect();
    let all = |has: fn(&Module) -> bool, what: &str| {
        let count = modules.iter().filter(|module| has(module)).count();
        if count != 0 && count != modules.len() {
            return Err(refused(adapter, &format!("has {what} in some of its modules")));
        }
        Ok(count > 0)
    };
    let dora = all(|module| module.magnitude.is_some(), "magnitudes")?;
    let bias = all(|module| module.bias.is_some(), "biases")?;
    let stabilized = adapter.semantics().rank_stabilized;
    let ranks: Vec<u64> = modules.iter().map(|module| module.rank).collect();
    let Scales { rank, alpha, rank_pattern, alpha_pattern } =
        Scales::of(&modules, &ranks, stabilized);
    let targets: Vec<&str> = modules.iter().map(|module| module.path.as_str()).collect();
    let config = json!({
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.semantics().base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": targets,
        "use_dora": dora,
        "lora_bias": bias,
        "use_rslora": stabilized,
        "bias": "none",
        "fan_in_fan_out": adapter.semantics().stored_transposed,
        "init_lora_weights": true,
        "inference_mode": true,
    });
    match config {
        Value::Object(fields) => Ok(fields),
        _ => unreachable!("an object was written down"),
    }
}
