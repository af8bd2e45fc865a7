//! An adapter written as MLX's: factors transposed, one rank and one scale in all.

use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::json;

use super::{CONTAINERS, WEIGHTS};
use crate::adapter::deltas::transposed;
use crate::adapter::factors::Pair;
use crate::adapter::format::WriteOptions;
use crate::adapter::formats::peft::config;
use crate::adapter::{Adapter, Expert, Grammar, Initialization, LayerKind, Module, expert_factors};
use crate::error::{Error, Owner, Result};
use crate::kernel::convert::widen_f64;
use crate::storage::local;
use crate::storage::memory::Bytes;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{NamedTensor, Tensor, TensorFile, write};

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
struct Layout {
    rank: u64,
    factor: f64,
}

impl Layout {
    /// The factors of a module, transposed.
    fn pair(&self, module: &Module) -> Result<[Tensor; 2]> {
        let pair = self.filled(module.pair(None, None, None)?);
        let (rank, inputs, outputs) = (pair.rank, pair.inputs, pair.outputs);
        let turned = |bytes: &[u8], extents, dtype: &Dtype| transposed(bytes, extents, dtype);
        let (first, second) = if module.delta.is_by_tokens() {
            // Outputs are tokens: lora_a is B as it stands, and lora_b is A.
            let shapes = [vec![outputs as u64, rank as u64], vec![rank as u64, inputs as u64]];
            let [a, b] = shapes;
            ((pair.b_dtype, a, pair.b), (pair.a_dtype, b, pair.a))
        } else {
            let a = turned(&pair.a, (rank, inputs), &pair.a_dtype);
            let b = turned(&pair.b, (outputs, rank), &pair.b_dtype);
            (
                (pair.a_dtype, vec![inputs as u64, rank as u64], a),
                (pair.b_dtype, vec![rank as u64, outputs as u64], b),
            )
        };
        Ok([tensor(first)?, tensor(second)?])
    }

    /// The factors of all experts, one after the other.
    fn experts(&self, module: &Module) -> Result<[Tensor; 2]> {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let mut last: Option<Pair> = None;
        let count = module.products().count() as u64;
        for index in 0..count {
            let pair = self.filled(module.pair(Some(Expert { index, count }), None, None)?);
            a.extend_from_slice(&pair.a);
            b.extend_from_slice(&pair.b);
            last = Some(pair);
        }
        let Some(Pair { a_dtype, b_dtype, rank, outputs, inputs, .. }) = last else {
            return Err(Error::Argument(format!("{} has no experts", module.key)));
        };
        let (rank, outputs, inputs) = (rank as u64, outputs as u64, inputs as u64);
        Ok([
            tensor((a_dtype, vec![count, rank, inputs], a))?,
            tensor((b_dtype, vec![count, outputs, rank], b))?,
        ])
    }

    /// The same product of the common rank, without a factor.
    fn filled(&self, mut pair: Pair) -> Pair {
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

fn tensor((dtype, shape, bytes): (Dtype, Vec<u64>, Vec<u8>)) -> Result<Tensor> {
    let name = "factor".to_owned();
    let bytes = Some(Bytes::Loaded(bytes));
    let tensor = NamedTensor { name: name.clone(), dtype, shape, bytes };
    let file = TensorFile::in_memory(Path::new(&name), Owner::Adapter, vec![tensor], None)?;
    Ok(Arc::new(file).value(&name).expect("the one that it holds"))
}
