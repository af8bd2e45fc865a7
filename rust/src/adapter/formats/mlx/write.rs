//! An adapter written as MLX's: factors transposed, one rank and one scale in all.

use std::path::Path;

use indexmap::IndexMap;
use serde_json::json;

use super::{CONTAINERS, WEIGHTS};
use crate::adapter::factors::Pair;
use crate::adapter::format::WriteOptions;
use crate::adapter::formats::peft::config;
use crate::adapter::{
    Adapter, Expert, Grammar, Initialization, LayerKind, Module, computed, expert_factors,
};
use crate::error::{Error, Result};
use crate::kernel::convert::widen_f64;
use crate::storage::local;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{Tensor, write};

pub(super) fn write_adapter(
    adapter: &Adapter,
    directory: &Path,
    options: &WriteOptions<'_>,
) -> Result<()> {
    check(adapter)?;
    let apart = |module: &Module| {
        let parts = expert_factors::apart(module, ["gate_proj", "up_proj"]);
        parts.unwrap_or_else(|| vec![module.clone()])
    };
    let all: Vec<Module> = adapter.modules().values().flat_map(apart).collect();
    let modules = || all.iter();
    let rank = modules().map(|module| module.rank).max().unwrap_or(1);
    let mut scales = modules().map(|module| module.scaling * module.repeats());
    let first = scales.next().unwrap_or(1.0);
    let scale = if scales.all(|scale| scale == first) { first } else { 1.0 };
    let (mut tensors, mut keys) = (Vec::new(), Vec::new());
    for module in modules() {
        let key = name_of(adapter, module)?;
        let layout = Layout { rank, factor: module.scaling * module.repeats() / scale };
        let [a, b] = match module.delta.holds_experts() {
            true => layout.experts(module)?,
            false => layout.pair(module)?,
        };
        tensors.push((format!("{key}.lora_a"), a));
        tensors.push((format!("{key}.lora_b"), b));
        let magnitude = module.magnitude.iter().map(|magnitude| {
            let mut info = magnitude.info().clone();
            info.shape = vec![magnitude.elements()];
            (format!("{key}.m"), Tensor::new(magnitude.file().clone(), info))
        });
        tensors.extend(magnitude);
        keys.push(key);
    }
    for (_, tensor) in &mut tensors {
        *tensor = options.cast(tensor)?;
    }
    let is_dora = modules().any(|module| module.magnitude.is_some());
    let config = json!({
        "model": adapter.semantics().base,
        "fine_tune_type": if is_dora { "dora" } else { "lora" },
        // Keys are whole paths, so that they hold in whichever of the last layers.
        "num_layers": layers(&keys),
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    });
    local::create_directories(directory)?;
    let metadata = IndexMap::from([("format".to_owned(), "mlx".to_owned())]);
    write::write(&directory.join(WEIGHTS), metadata, tensors)?;
    let text = serde_json::to_vec_pretty(&config).expect("plain data");
    local::write_small(&directory.join(config::FILE_NAME), &text)
}

/// # Errors
/// What the format cannot say.
fn check(adapter: &Adapter) -> Result<()> {
    let refused = |what: String| {
        Error::unsupported(adapter.path(), format!("{what}, which MLX's format cannot say of it"))
    };
    let semantics = adapter.semantics();
    if semantics.initialization != Initialization::Plain || semantics.layer_replication.is_some() {
        return Err(refused("changed the base before it was trained".into()));
    }
    if let Some(saved) = adapter.saved().first() {
        return Err(refused(format!("brings {} whole beside its factors", saved.path)));
    }
    if let Some(rows) = adapter.trained_rows().first() {
        return Err(refused(format!("brings rows of {} whole", rows.path)));
    }
    if adapter.grammar() != Grammar::Dotted {
        return Err(Error::unsupported(
            adapter.path(),
            "has flattened names, of which only the base tells where the dots were; give the base",
        ));
    }
    let modules = || adapter.modules().values();
    let has_magnitudes = modules().any(|module| module.magnitude.is_some());
    for module in modules() {
        let path = &module.path;
        if !module.scaling.is_finite() {
            return Err(Error::adapter(
                adapter.path(),
                format!(
                    "tells no scale for {path}, which MLX's config has to name; give its config"
                ),
            ));
        }
        if module.kind == LayerKind::Convolution {
            return Err(refused(format!("changes the convolution {path}")));
        }
        if module.bias.is_some() {
            return Err(refused(format!("has a bias on the second factor of {path}")));
        }
        if has_magnitudes != module.magnitude.is_some() {
            return Err(refused(format!("has magnitudes, but none for {path}")));
        }
        let by_width = module.kind == LayerKind::Embedding && !module.delta.is_by_tokens();
        if by_width && module.magnitude.is_some() {
            return Err(refused(format!(
                "has magnitudes for the columns of the embedding {path} and not for its tokens"
            )));
        }
    }
    Ok(())
}

/// What MLX calls a module.
fn name_of(adapter: &Adapter, module: &Module) -> Result<String> {
    if !module.delta.holds_experts() {
        return Ok(module.path.clone());
    }
    let own = module.only_parameter().map(|parameter| parameter.name.as_str());
    match (adapter.format(), own, module.path.rsplit_once('.')) {
        ("mlx", Some(own), _) if own != "gate_up_proj" => Ok(module.key.clone()),
        (_, Some(own @ ("gate_proj" | "up_proj" | "down_proj")), Some((parent, "experts"))) => {
            Ok(format!("{parent}.{}.{own}", CONTAINERS[0]))
        }
        _ => Err(Error::unsupported(
            adapter.path(),
            format!(
                "has factors of all experts under {}, which MLX has as gate_proj, up_proj and \
                 down_proj apart; which of its rows are which only the model tells",
                module.key
            ),
        )),
    }
}

/// How many of the last blocks hold what was trained: as many as the numbers in the names tell.
fn layers(keys: &[String]) -> u64 {
    let number = |key: &String| key.split('.').find_map(|part| part.parse::<u64>().ok());
    keys.iter().filter_map(number).max().map_or(0, |last| last + 1)
}

/// The common rank, and what a module's second factor is multiplied by.
#[derive(Clone, Copy)]
struct Layout {
    rank: u64,
    factor: f64,
}

impl Layout {
    /// The factors of a module, transposed.
    fn pair(self, module: &Module) -> Result<[Tensor; 2]> {
        let [a, b] = self.factors(module, None)?;
        if module.delta.is_by_tokens() {
            // Outputs are tokens: lora_a is B as it stands, and lora_b is A.
            return Ok([b, a]);
        }
        Ok([computed::transposed(&a)?, computed::transposed(&b)?])
    }

    /// The factors of all experts, one after the other.
    fn experts(self, module: &Module) -> Result<[Tensor; 2]> {
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let count = module.products().count() as u64;
        for index in 0..count {
            let factors = self.factors(module, Some(Expert { index, count }))?;
            let [a, b] = factors.map(|one| {
                let shape = [1, one.shape[0], one.shape[1]];
                computed::reshaped(&one, shape.to_vec())
            });
            first.push(a);
            second.push(b);
        }
        if count == 0 {
            return Err(Error::Argument(format!("{} has no experts", module.key)));
        }
        Ok([computed::stacked(&first)?, computed::stacked(&second)?])
    }

    fn factors(self, module: &Module, expert: Option<Expert>) -> Result<[Tensor; 2]> {
        let delta = module.delta.clone();
        computed::changed(&module.delta, move || Ok(self.filled(delta.pair(expert, None)?)))
    }

    /// The same product of the common rank, without a factor.
    fn filled(self, mut pair: Pair) -> Pair {
        if self.factor != 1.0 {
            let (_, exponent) = (self.factor, self.factor.abs().log2());
            let is_power = exponent.fract() == 0.0;
            // A power of two changes no digit; else a 16-bit factor would be rounded once more.
            let dtype = match pair.b_dtype {
                Dtype::F16 | Dtype::Bf16 => Dtype::F32,
                ref other => other.clone(),
            };
            let values = widen_f64(&pair.b_dtype, &pair.b);
            let scaled = values.into_iter().map(|value| value * self.factor);
            (pair.b, pair.b_dtype) = match dtype {
                Dtype::F64 => (scaled.flat_map(f64::to_le_bytes).collect(), Dtype::F64),
                _ if is_power && pair.b_dtype == Dtype::Bf16 => {
                    let half = |value: f64| ((value as f32).to_bits() >> 16) as u16;
                    (scaled.flat_map(|value| half(value).to_le_bytes()).collect(), Dtype::Bf16)
                }
                _ => {
                    let single = scaled.flat_map(|value| (value as f32).to_le_bytes());
                    (single.collect(), Dtype::F32)
                }
            };
        }
        let missing = (self.rank as usize).saturating_sub(pair.rank);
        if missing > 0 {
            pair.a.resize(pair.a.len() + missing * pair.inputs * pair.a_dtype.size(), 0);
            let size = pair.b_dtype.size();
            let zeros = vec![0; missing * size];
            let rows = pair.b.chunks_exact(pair.rank * size);
            pair.b = rows.flat_map(|row| row.iter().chain(&zeros)).copied().collect();
            pair.rank = self.rank as usize;
        }
        pair
    }
}
