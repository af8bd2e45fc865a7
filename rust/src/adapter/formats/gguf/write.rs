//! An adapter written as a GGUF file: its factors under llama.cpp's names and in its order of rows,
//! with one alpha for all, into which its scales are brought.

use std::path::Path;

use indexmap::IndexMap;

use super::architectures::{self, Architecture};
use super::rows::{Heads, Orders, Unordered, inverse};
use super::{
    ADAPTER, ADAPTER_TYPE, ALPHA, ARCHITECTURE, BASE_NAME, BASE_URL, EMBEDDINGS, FIRST,
    GENERAL_TYPE, HEADS, HUB, KEY_HEADS, LORA, SECOND, WEIGHT, config_of, model_types,
};
use crate::adapter::deltas::transposed;
use crate::adapter::factors::Pair;
use crate::adapter::format::WriteOptions;
use crate::adapter::{Adapter, Initialization, LayerKind, Module, grammar};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::kernel::convert::{convert, for_each_f64, widen_f64};
use crate::limits;
use crate::tensor::dtype::Dtype;
use crate::tensor::gguf::write::{Entry, Planned, Take, write};

/// llama.cpp's numbers of file types (`LlamaFileType`).
const FILE_TYPES: [(Dtype, u32); 3] = [(Dtype::F32, 0), (Dtype::F16, 1), (Dtype::Bf16, 32)];

/// The modules that become one pair of tensors.
struct Pairing<'a> {
    tensor: String,
    /// The tensor's name within its block.
    own: &'static str,
    /// One, or each expert's.
    modules: Vec<Option<&'a Module>>,
    is_of_experts: bool,
    rank: u64,
    outputs: u64,
    inputs: u64,
    orders: Orders,
    a_dtype: Dtype,
    b_dtype: Dtype,
}

pub(super) fn write_adapter(
    adapter: &Adapter,
    target: &Path,
    options: &WriteOptions<'_>,
) -> Result<()> {
    let base = options.base.ok_or_else(|| {
        Error::Argument(format!(
            "{}: writing a GGUF adapter takes the base, whose config tells the architecture and the \
             heads",
            adapter.path().display()
        ))
    })?;
    let resolved = grammar::resolve(adapter, base)?;
    let adapter = resolved.as_ref().unwrap_or(adapter);
    check_expressible(adapter)?;
    let architecture = architecture_of(base)?;
    let heads = config_of(base).map(Heads::of_config).unwrap_or_default();
    let alpha = common_alpha(adapter);
    let writer = Writer { adapter, base, architecture, heads, alpha, dtype: options.dtype.clone() };
    let pairings = writer.pairings()?;
    let mut planned = Vec::with_capacity(2 * pairings.len());
    for pairing in &pairings {
        planned.extend(pairing.planned());
    }
    let metadata = writer.metadata(&planned);
    write(target, &metadata, &planned, |place, take| {
        let pairing = &pairings[place / 2];
        if place % 2 == 0 { writer.first(pairing, take) } else { writer.second(pairing, take) }
    })
}

fn refused(adapter: &Adapter, what: &str) -> Error {
    Error::unsupported(adapter.path(), format!("{what}, which a GGUF adapter cannot say of it"))
}

/// Refuses what llama.cpp has no place for.
fn check_expressible(adapter: &Adapter) -> Result<()> {
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
    if let Some(saved) = adapter.saved().first() {
        return Err(refused(adapter, &format!("brings {} whole", saved.path)));
    }
    if let Some(rows) = adapter.trained_rows().first() {
        return Err(refused(adapter, &format!("brings trained rows of {}", rows.path)));
    }
    for module in adapter.modules().values() {
        let path = &module.path;
        let what = if module.magnitude.is_some() {
            format!("rescales {path} by DoRA")
        } else if module.bias.is_some() {
            format!("adds a bias to {path}")
        } else if !module.parameters.is_empty() || module.delta.holds_experts() {
            format!("changes a parameter that holds the experts of {path} together")
        } else if module.kind == LayerKind::Convolution {
            format!("changes the convolution {path}")
        } else if module.repeats() != 1.0 {
            format!("adds the product of {path} twice")
        } else if !module.delta.is_low_rank() {
            format!("adds to {path} what is no product of two matrices")
        } else if !module.scaling.is_finite() {
            return Err(Error::Argument(format!(
                "{}: its scale is not known; give its config",
                adapter.path().display()
            )));
        } else {
            continue;
        };
        return Err(refused(adapter, &what));
    }
    if adapter.modules().is_empty() {
        return Err(refused(adapter, "changes no module"));
    }
    Ok(())
}

fn architecture_of(base: &Checkpoint) -> Result<&'static Architecture> {
    let types = model_types(base);
    types.iter().find_map(|name| architectures::of_model_type(name)).ok_or_else(|| {
        let what = match types.first() {
            Some(model_type) => format!(
                "is of the model_type {model_type}, whose names in GGUF files are not known"
            ),
            None => "does not say its model_type (config.json), which a GGUF adapter needs".into(),
        };
        Error::unsupported(base.path(), what)
    })
}

/// The alpha that most modules have, in the file's type; the first of those. One that is not zero:
/// zero stands for a scale of 1.
fn common_alpha(adapter: &Adapter) -> f64 {
    let mut counts = IndexMap::<u64, usize>::new();
    for module in adapter.modules().values() {
        let alpha = own_alpha(module, module.rank);
        if alpha != 0.0 && (alpha as f32).is_finite() && alpha as f32 != 0.0 {
            *counts.entry(alpha.to_bits()).or_default() += 1;
        }
    }
    let most = counts.values().max();
    let usual = counts.iter().find(|(_, count)| Some(*count) == most);
    usual.map_or(1.0, |(alpha, _)| f64::from_bits(*alpha))
}

/// The alpha that gives a module its scale, α/r.
fn own_alpha(module: &Module, rank: u64) -> f64 {
    module.scaling * rank as f64
}

struct Writer<'a> {
    adapter: &'a Adapter,
    base: &'a Checkpoint,
    architecture: &'static Architecture,
    heads: Heads,
    alpha: f64,
    dtype: Option<Dtype>,
}

impl<'a> Writer<'a> {
    fn broken(&self, message: String) -> Error {
        Error::unsupported(self.adapter.path(), message)
    }

    /// What becomes one pair of tensors, in the order of the adapter.
    fn pairings(&self) -> Result<Vec<Pairing<'a>>> {
        let mut groups = IndexMap::<String, (&'static str, Vec<(Option<u64>, &'a Module)>)>::new();
        for module in self.adapter.modules().values() {
            let path = &module.path;
            let Some((tensor, own, expert)) = self.architecture.tensor_of(path) else {
                return Err(self.broken(format!(
                    "changes {path}, which has no tensor of its own in GGUF files of {}",
                    self.architecture.name
                )));
            };
            if tensor == "output" && self.has_no_head(path) {
                return Err(self.broken(format!(
                    "changes {path}, whose weight the base {} shares with its embeddings, so that its \
                     GGUF file has no tensor for it",
                    self.base.path().display()
                )));
            }
            if (own == EMBEDDINGS) != (module.kind == LayerKind::Embedding) {
                return Err(self.broken(format!(
                    "changes {path} as a layer of another kind ({}) than it is",
                    module.kind.name()
                )));
            }
            let (_, members) = groups.entry(tensor).or_insert((own, Vec::new()));
            if members.iter().any(|(other, _)| *other == expert) {
                return Err(self.broken(format!("changes {path} twice, under two names")));
            }
            members.push((expert, module));
        }
        groups
            .into_iter()
            .map(|(tensor, (own, members))| self.pairing(tensor, own, members))
            .collect()
    }

    /// Whether the base has no weight of its own for the head.
    fn has_no_head(&self, path: &str) -> bool {
        let tail = path.rsplit('.').next().unwrap_or(path);
        let is_it = |name: &String| {
            name.strip_suffix(WEIGHT).is_some_and(|bare| bare.rsplit('.').next() == Some(tail))
        };
        self.base.ties_embeddings() && !self.base.tensors().keys().any(is_it)
    }

    fn pairing(
        &self,
        tensor: String,
        own: &'static str,
        members: Vec<(Option<u64>, &'a Module)>,
    ) -> Result<Pairing<'a>> {
        let first = members[0].1;
        let is_of_experts = members[0].0.is_some();
        let (outputs, inputs) = (first.outputs(), first.inputs());
        let modules = if is_of_experts {
            let count = self.experts()?;
            let mut modules = vec![None; count as usize];
            for (expert, module) in &members {
                let place =
                    expert.and_then(|expert| modules.get_mut(usize::try_from(expert).ok()?));
                let Some(place) = place else {
                    return Err(self.broken(format!(
                        "changes {}, and the base has {count} experts",
                        module.path
                    )));
                };
                if (module.outputs(), module.inputs()) != (outputs, inputs) {
                    return Err(self.broken(format!(
                        "changes {} in another shape than {}",
                        module.path, first.path
                    )));
                }
                *place = Some(*module);
            }
            modules
        } else {
            vec![Some(first)]
        };
        // What other experts lack is zero.
        let rank = members.iter().map(|(_, module)| module.product_rank(module.rank)).max();
        let rank = rank.unwrap_or(1);
        let orders = self.architecture.rows.orders(own, self.heads, outputs, inputs);
        let orders = orders.map_err(|error| match error {
            Unordered::Unfit(why) => self.broken(format!("changes {}, which {why}", first.path)),
            Unordered::Unknown => Error::unsupported(
                self.base.path(),
                "does not say how many heads it has (config.json), which a GGUF adapter needs",
            ),
        })?;
        let mut pairing = Pairing {
            tensor,
            own,
            modules,
            is_of_experts,
            rank,
            outputs,
            inputs,
            orders,
            a_dtype: Dtype::F32,
            b_dtype: Dtype::F32,
        };
        (pairing.a_dtype, pairing.b_dtype) = self.dtypes(&pairing)?;
        Ok(pairing)
    }

    fn experts(&self) -> Result<u64> {
        let config = config_of(self.base);
        let number = |name: &str| config?.get(name)?.as_u64();
        let names = ["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"];
        let found = names.into_iter().find_map(number);
        found.filter(|count| *count <= limits::EXPERTS).ok_or_else(|| {
            Error::unsupported(
                self.base.path(),
                "does not say how many experts it has (config.json), which a GGUF adapter needs",
            )
        })
    }

    /// What the second factor is multiplied by, so that the common alpha gives the module's scale.
    fn factor(&self, module: &Module, rank: u64) -> f64 {
        own_alpha(module, rank) / self.alpha
    }

    /// The types of both factors: those that they have, where these hold them.
    fn dtypes(&self, pairing: &Pairing<'a>) -> Result<(Dtype, Dtype)> {
        if let Some(dtype) = &self.dtype {
            return Ok((dtype.clone(), dtype.clone()));
        }
        let mut types: Option<(Dtype, Dtype)> = None;
        for module in pairing.modules.iter().flatten() {
            let pair = module.pair(None, None, None)?;
            let factor = self.factor(module, pairing.rank);
            let b = if is_exact(&pair, factor) { pair.b_dtype.clone() } else { Dtype::F32 };
            let narrow = |dtype: Dtype| if dtype == Dtype::F64 { Dtype::F32 } else { dtype };
            let own = (narrow(pair.a_dtype), narrow(b));
            types = Some(match types {
                None => own,
                Some((a, b)) => (wider(a, own.0), wider(b, own.1)),
            });
        }
        Ok(types.unwrap_or((Dtype::F32, Dtype::F32)))
    }

    fn pair(&self, module: &Module) -> Result<Pair> {
        module.pair(None, None, None)
    }

    /// The bytes of the first factor: (r, in), of embeddings transposed; of experts one below the
    /// other, each handed over by itself.
    fn first(&self, pairing: &Pairing<'a>, take: &mut Take<'_>) -> Result<()> {
        let (rank, inputs) = (pairing.rank as usize, pairing.inputs as usize);
        let size = pairing.a_dtype.size();
        for module in &pairing.modules {
            let mut bytes = Vec::new();
            if let Some(module) = module {
                let pair = self.pair(module)?;
                let mut values = widen_f64(&pair.a_dtype, &pair.a);
                if let Some(order) = &pairing.orders.inputs {
                    let inverse = inverse(order);
                    let rows = values.chunks_exact(inputs);
                    values = rows
                        .flat_map(|row| inverse.iter().map(|place| row[*place as usize]))
                        .collect();
                }
                bytes = self.narrowed(&values, &pairing.a_dtype, module)?;
            }
            bytes.resize(rank * inputs * size, 0);
            if pairing.own == EMBEDDINGS {
                bytes = transposed(&bytes, (rank, inputs), &pairing.a_dtype);
            }
            take(&bytes)?;
        }
        Ok(())
    }

    /// The bytes of the second factor, (out, r), which holds what the common alpha does not say; of
    /// experts as the first.
    fn second(&self, pairing: &Pairing<'a>, take: &mut Take<'_>) -> Result<()> {
        let (rank, outputs) = (pairing.rank as usize, pairing.outputs as usize);
        let size = pairing.b_dtype.size();
        let inverse = pairing.orders.outputs.as_ref().map(|order| inverse(order));
        for module in &pairing.modules {
            let mut bytes = Vec::new();
            if let Some(module) = module {
                let pair = self.pair(module)?;
                let factor = self.factor(module, pairing.rank);
                let stored = widen_f64(&pair.b_dtype, &pair.b);
                let mut values = Vec::with_capacity(outputs * rank);
                for row in 0..outputs {
                    let own = inverse.as_ref().map_or(row, |inverse| inverse[row] as usize);
                    let line = &stored[own * pair.rank..(own + 1) * pair.rank];
                    values.extend(line.iter().map(|value| value * factor));
                    values.resize((row + 1) * rank, 0.0);
                }
                bytes = self.narrowed(&values, &pairing.b_dtype, module)?;
            }
            bytes.resize(outputs * rank * size, 0);
            take(&bytes)?;
        }
        Ok(())
    }

    fn narrowed(&self, values: &[f64], dtype: &Dtype, module: &Module) -> Result<Vec<u8>> {
        let source: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut bytes = vec![0; values.len() * dtype.size()];
        let is_finite = convert(&Dtype::F64, &source, dtype, &mut bytes);
        if !is_finite && values.iter().all(|value| value.is_finite()) {
            return Err(Error::Argument(format!(
                "{}: the factors of {} have values too large for {dtype}; write them in a wider type",
                self.adapter.path().display(),
                module.path
            )));
        }
        Ok(bytes)
    }

    fn metadata(&self, planned: &[Planned]) -> Vec<(String, Entry)> {
        let text = |value: &str| Entry::Text(value.to_owned());
        let mut entries = vec![
            (ARCHITECTURE.to_owned(), text(self.architecture.name)),
            (GENERAL_TYPE.to_owned(), text(ADAPTER)),
        ];
        if let Some(base) = &self.adapter.semantics().base {
            entries.push(("general.base_model.count".to_owned(), Entry::U32(1)));
            entries.push((BASE_NAME.to_owned(), text(base)));
            // A path names nothing to others.
            let is_id = base.matches('/').count() == 1 && !base.starts_with(['/', '.', '~']);
            if is_id && !base.contains(['\\', ':', ' ']) {
                entries.push((BASE_URL.to_owned(), text(&format!("{HUB}{base}"))));
            }
        }
        let of_type = |(dtype, _): &&(Dtype, u32)| planned.iter().all(|one| one.dtype == *dtype);
        if let Some((_, number)) = FILE_TYPES.iter().find(of_type) {
            entries.push(("general.file_type".to_owned(), Entry::U32(*number)));
        }
        entries.push((ADAPTER_TYPE.to_owned(), text(LORA)));
        entries.push((ALPHA.to_owned(), Entry::F32(self.alpha as f32)));
        // Which llama.cpp does not ask an adapter for, and without which nobody but the base can
        // bring rows back into their order.
        let heads = [(HEADS, self.heads.queries), (KEY_HEADS, self.heads.keys)];
        for (key, count) in heads {
            if let Some(count) = count.and_then(|count| u32::try_from(count).ok()) {
                entries.push((format!("{}{key}", self.architecture.name), Entry::U32(count)));
            }
        }
        entries
    }
}

impl Pairing<'_> {
    fn planned(&self) -> [Planned; 2] {
        let Self { rank, outputs, inputs, .. } = *self;
        let (mut a, mut b) = (vec![rank, inputs], vec![outputs, rank]);
        if self.own == EMBEDDINGS {
            a.reverse();
        }
        if self.is_of_experts {
            let count = self.modules.len() as u64;
            a.insert(0, count);
            b.insert(0, count);
        }
        let name = |part: &str| format!("{}{WEIGHT}{part}", self.tensor);
        [
            Planned { name: name(FIRST), dtype: self.a_dtype.clone(), shape: a },
            Planned { name: name(SECOND), dtype: self.b_dtype.clone(), shape: b },
        ]
    }
}

/// Whether the second factor's type holds its product with a number.
fn is_exact(pair: &Pair, factor: f64) -> bool {
    if factor == 1.0 {
        return true;
    }
    let mut scaled = Vec::with_capacity(pair.b.len());
    for_each_f64(&pair.b_dtype, &pair.b, |_, value| scaled.push(value * factor));
    let source: Vec<u8> = scaled.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut bytes = vec![0; pair.b.len()];
    convert(&Dtype::F64, &source, &pair.b_dtype, &mut bytes);
    let back = widen_f64(&pair.b_dtype, &bytes);
    back.iter().zip(&scaled).all(|(back, value)| back == value || value.is_nan())
}

/// The narrowest type of the two that holds both.
fn wider(one: Dtype, other: Dtype) -> Dtype {
    if one == other { one } else { Dtype::F32 }
}
