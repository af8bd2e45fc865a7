//! An adapter written as PEFT's: its own file and config where it was read from these, else a
//! config made from its modules.

use std::path::Path;

use indexmap::{IndexMap, IndexSet};
use serde_json::{Map, Value, json};

use super::config::Method;
use super::methods::{self, Laid};
use super::{WEIGHTS, config, key_names};
use crate::adapter::factors::Pair;
use crate::adapter::format::WriteOptions;
use crate::adapter::{
    Adapter, Expert, Grammar, Initialization, LayerKind, Module, Saved, TrainedRows, computed,
};
use crate::error::{Error, Result};
use crate::storage::local;
use crate::tensor::safetensors::{Tensor, write};

/// How the factors of all experts are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExpertLayout {
    /// As those of a parameter (`target_parameters`): A (experts · rank, in), and B (out, rank · experts)
    /// with the expert as the fastest index.
    Parameters,
    /// A [experts, rank, in] and B [experts, out, rank].
    Stacked,
}

pub(super) fn write_adapter(
    adapter: &Adapter,
    directory: &Path,
    options: &WriteOptions<'_>,
    experts: ExpertLayout,
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
            None => (config_of(adapter, experts)?, tensors_of(adapter, experts)?),
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
    let is_updated =
        |rows: &&TrainedRows| adapter.modules().values().any(|own| own.path == rows.path);
    if let Some(rows) = adapter.trained_rows().iter().find(is_updated) {
        return Err(refused(adapter, &format!("updates {} and brings rows of it", rows.path)));
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
fn tensors_of(adapter: &Adapter, experts: ExpertLayout) -> Result<Vec<(String, Tensor)>> {
    let mut tensors = Vec::new();
    for module in adapter.modules().values() {
        if module.delta.holds_experts() {
            let [name_a, name_b, ..] = key_names::names_of(&module.key, false);
            let [a, b] = factors_of_experts(module, experts)?;
            tensors.extend([(name_a, a), (name_b, b)]);
            continue;
        }
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
    for saved in adapter.saved() {
        let (module, leaf) = module_of(saved);
        let is_bias = !saved.trained_apart && leaf == "bias";
        // PEFT puts a layer of its own around one that it updates.
        let is_inside = adapter.modules().values().any(|own| own.path == module);
        if !is_bias && (module.is_empty() || is_inside && saved.trained_apart) {
            return Err(refused(adapter, &format!("brings {} whole", saved.path)));
        }
        let name =
            if is_inside { format!("{module}.base_layer.{leaf}") } else { saved.path.clone() };
        tensors.push((key_names::saved_name(&name), saved.tensor.clone()));
    }
    for rows in adapter.trained_rows() {
        tensors.push((key_names::name_of(&rows.path, key_names::ROWS), rows.tensor.clone()));
    }
    Ok(tensors)
}

/// The module of a parameter that was trained whole, and the parameter's name in it.
fn module_of(saved: &Saved) -> (&str, &str) {
    saved.path.rsplit_once('.').unwrap_or(("", &saved.path))
}

/// The two factors of a module, as they are stored or put together; `None` where there is more than
/// two matrices.
fn factors_of(module: &Module) -> Result<Option<(Tensor, Tensor)>> {
    if let Some((a, b)) = module.delta.plain() {
        return Ok(Some((a.clone(), b.clone())));
    }
    if module.delta.is_by_tokens() {
        // PEFT's embedding is the transpose of its product, and has a magnitude for each column.
        if module.magnitude.is_some() || module.bias.is_some() {
            return Ok(None);
        }
        let [a, b] = computed::expanded(&module.delta, None)?;
        return Ok(Some((computed::transposed(&b)?, computed::transposed(&a)?)));
    }
    if !module.delta.is_low_rank() || module.kind == LayerKind::Convolution {
        return Ok(None);
    }
    let [a, b] = computed::expanded(&module.delta, None)?;
    Ok(Some((a, b)))
}

/// The factors of all experts in that layout.
fn factors_of_experts(module: &Module, layout: ExpertLayout) -> Result<[Tensor; 2]> {
    let count = module.products().count() as u64;
    let pairs: Vec<Pair> = (0..count)
        .map(|index| module.pair(Some(Expert { index, count }), None, None))
        .collect::<Result<_>>()?;
    let name = Path::new(&module.path);
    let Some(first) = pairs.first() else {
        return Err(Error::Argument(format!("{} has no experts", module.key)));
    };
    let [rank, inputs, outputs] = [first.rank, first.inputs, first.outputs].map(|one| one as u64);
    let (a_dtype, b_dtype) = (first.a_dtype.clone(), first.b_dtype.clone());
    let all = |bytes: fn(&Pair) -> &Vec<u8>, count: u64| -> Vec<u8> {
        pairs.iter().take(count as usize).flat_map(bytes).copied().collect()
    };
    let (a, a_shape, b, b_shape) = match layout {
        ExpertLayout::Stacked => {
            // One factor that all experts share is written once.
            let share = |bytes: fn(&Pair) -> &Vec<u8>| {
                pairs.iter().all(|pair| bytes(pair) == bytes(first)) && count > 1
            };
            let (shares_a, shares_b) = (share(|pair| &pair.a), share(|pair| &pair.b));
            let a_count = if shares_a { 1 } else { count };
            let b_count = if shares_b && !shares_a { 1 } else { count };
            let (a, b) = (all(|pair| &pair.a, a_count), all(|pair| &pair.b, b_count));
            (a, vec![a_count, rank, inputs], b, vec![b_count, outputs, rank])
        }
        ExpertLayout::Parameters => {
            let a = all(|pair| &pair.a, count);
            let size = b_dtype.size();
            let mut b = Vec::with_capacity(pairs.iter().map(|pair| pair.b.len()).sum());
            for place in (0..first.b.len()).step_by(size) {
                b.extend(pairs.iter().flat_map(|pair| &pair.b[place..place + size]));
            }
            (a, vec![count * rank, inputs], b, vec![outputs, rank * count])
        }
    };
    Ok([
        Tensor::in_memory(name, "A", a_dtype, a_shape, a)?,
        Tensor::in_memory(name, "B", b_dtype, b_shape, b)?,
    ])
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
            let key = format!("^{}$", known_as(module).replace('.', r"\."));
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

/// The path by which a config knows a module, or the parameter that its factors belong to.
fn known_as(module: &Module) -> String {
    match module.only_parameter() {
        Some(parameter) => format!("{}.{}", module.path, parameter.name),
        None => module.path.clone(),
    }
}

/// The first release that lays the experts of every model so that the factors are those of layers.
const OF_LAYERS: &str = "0.19.1";

/// What the biases of second factors are called in messages.
const BIASES: &str = "biases";

/// Whether a module is of a kind that has a bias on its second factor where the config says so.
fn is_layer(module: &Module) -> bool {
    module.kind != LayerKind::Embedding && !module.delta.holds_experts()
}

fn config_of(adapter: &Adapter, experts: ExpertLayout) -> Result<Map<String, Value>> {
    let modules: Vec<&Module> = adapter.modules().values().collect();
    let all = |has: fn(&Module) -> bool, what: &str| {
        let count = modules.iter().filter(|module| has(module)).count();
        // Embeddings have no biases, whatever the config says.
        let own = modules.iter().filter(|module| what != BIASES || is_layer(module)).count();
        if count != 0 && count != own {
            return Err(refused(adapter, &format!("has {what} in some of its modules")));
        }
        Ok(count > 0)
    };
    let dora = all(|module| module.magnitude.is_some(), "magnitudes")?;
    let bias = all(|module| module.bias.is_some(), BIASES)?;
    let stabilized = adapter.semantics().rank_stabilized;
    let ranks: Vec<u64> = modules.iter().map(|module| module.rank).collect();
    let Scales { rank, alpha, rank_pattern, alpha_pattern } =
        Scales::of(&modules, &ranks, stabilized);
    let (parameters, targets): (Vec<&&Module>, Vec<&&Module>) =
        modules.iter().partition(|module| is_parameter(module, experts));
    let targets: Vec<String> = targets.into_iter().map(|module| known_as(module)).collect();
    let has_biases = adapter.saved().iter().any(|saved| !saved.trained_apart);
    let saved: IndexSet<&str> = (adapter.saved().iter())
        .filter(|saved| saved.trained_apart)
        .map(|saved| module_of(saved).0)
        .collect();
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
        "bias": if has_biases { "all" } else { "none" },
        "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
        "fan_in_fan_out": adapter.semantics().stored_transposed,
        "init_lora_weights": true,
        "inference_mode": true,
    });
    let Value::Object(mut fields) = config else { unreachable!("an object was written down") };
    if adapter.semantics().ties_weights {
        fields.insert("ensure_weight_tying".to_owned(), Value::Bool(true));
    }
    if !adapter.trained_rows().is_empty() {
        let rows = adapter.trained_rows().iter();
        let rows: Map<String, Value> =
            rows.map(|rows| (rows.path.clone(), json!(rows.rows))).collect();
        fields.insert("trainable_token_indices".to_owned(), rows.into());
    }
    if !parameters.is_empty() {
        let names: Vec<String> = parameters.into_iter().map(|module| known_as(module)).collect();
        fields.insert("target_parameters".to_owned(), json!(names));
        fields.insert("peft_version".to_owned(), OF_LAYERS.into());
    }
    Ok(fields)
}

/// Whether a module's factors are those of a parameter in PEFT's sense.
fn is_parameter(module: &Module, experts: ExpertLayout) -> bool {
    module.delta.holds_experts() && experts == ExpertLayout::Parameters
}
