//! An adapter extracted from two checkpoints: each layer's difference cut to a rank, module by module, in
//! memory for one module, with the floor of rounding below which nothing is told apart, and a bound on how
//! far each cut is from the best one of its rank.

mod difference;
mod pairs;
mod result;
mod sketch;
mod store;

use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::factored::{Decomposed, Factors, Rows, fix_signs, rounding_error};
use super::options::Writing;
use super::ranks::{Candidate, Measure, Rule, Spent, within};
use super::report::{BudgetReport, Report};
use super::results::Rounded;
use super::write::Output;
use crate::adapter::factors::common;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::quantized::QuantizedWeights;
use crate::convert;
use crate::error::{Error, Result};
use crate::parallel::task::{Task, build_pool};
use crate::storage::digest::sha256_of_bytes;
use crate::storage::local::Stamp;
use crate::tensor::dtype::Dtype;
use difference::{Difference, differ};
use pairs::{Pair, Part, Tables};
pub(super) use sketch::Source;
use sketch::{Leading, key, leading};
use store::{Done, Layer, Store};

/// The largest rank that a rule gives, where no other is asked for.
pub(super) const LARGEST_RANK: usize = 512;
/// The same of a budget, which needs the triplets of all modules before it is spent.
const BUDGET_RANK: usize = 128;
/// The rank that a rule is tried with first.
const FIRST_RANK: usize = 32;

/// What is asked of an extraction.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExtractOptions {
    /// The rule for ranks; `auto` if there is none.
    pub rank: Value,
    /// No module has more than this.
    pub max_rank: Option<u64>,
    /// Of the random vectors.
    pub seed: u64,
    /// How embeddings and language heads are written: `save`, `factors` or `skip`; `save` if there is none.
    pub embeddings: Option<String>,
    /// Whether what no factors can say, tables of tokens aside, is an error.
    pub strict: bool,
    /// How the result is written.
    pub write: Writing,
}

/// What an extraction knows of a module beside its record.
#[derive(Debug, Clone, Serialize)]
pub struct Extraction {
    /// The singular value at or below which rounding explains what is there.
    pub floor: f64,
    /// Where the spectrum of the rounding would end if it were even.
    pub mean_floor: f64,
    /// The share of ‖D‖² in singular values above the floor, as far as they were computed.
    pub energy_above: f64,
    /// A bound on (error² − optimum²)/‖D‖² of the cut before it was rounded.
    pub certificate: f64,
}

impl Extraction {
    /// Of a parameter, by what is known of its experts with their norms.
    fn of_all(own: &[(f64, Self)]) -> Self {
        let squares: f64 = own.iter().map(|(norm, _)| norm * norm).sum();
        let largest = |of: fn(&Self) -> f64| own.iter().map(|(_, one)| of(one)).fold(0.0, f64::max);
        let mean = |of: fn(&Self) -> f64| match own {
            [(_, only)] => of(only),
            _ => own.iter().map(|(norm, one)| norm * norm * of(one)).sum::<f64>() / squares,
        };
        Self {
            floor: largest(|one| one.floor),
            mean_floor: largest(|one| one.mean_floor),
            energy_above: mean(|one| one.energy_above),
            certificate: mean(|one| one.certificate),
        }
    }
}

/// What became of an extraction.
#[derive(Debug, Clone, Serialize)]
pub struct ExtractReport {
    /// As of other computations.
    #[serde(flatten)]
    pub report: Report,
    /// By modules.
    pub extraction: IndexMap<String, Extraction>,
    /// Parameters that are written whole.
    pub saved: Vec<String>,
    /// How many parameters are the same in both.
    pub unchanged: usize,
    /// How many parameters an earlier call had finished.
    pub resumed: usize,
}

/// How the ranks are chosen.
#[derive(Debug, Clone, Copy)]
struct Ask {
    rule: Rule,
    max_rank: Option<usize>,
}

/// Extracts what makes the tuned model of the base. What [`extract_part`] left in other directories is
/// taken from there, and these are removed.
///
/// # Errors
/// [`Error::Argument`] for options that make no sense, and where nothing differs; [`Error::Plan`] for
/// checkpoints of different models; [`Error::Checkpoint`] for what cannot be read or is not finite;
/// [`Error::Unsupported`] for what the format cannot hold; [`Error::Output`] if something is there already.
pub fn extract(
    tuned: &Checkpoint,
    base: &Checkpoint,
    output: &Path,
    options: &ExtractOptions,
    parts: &[PathBuf],
    task: &Task,
) -> Result<ExtractReport> {
    let ask = Ask::of(options)?;
    let place = Output::check(output, &options.write)?;
    let weights = [QuantizedWeights::of(tuned), QuantizedWeights::of(base)];
    let Prepared { pairs, dtype, holds_whole } = Prepared::of([tuned, base], &weights, options)?;
    let parameters = parameters(options);
    let digest = digest_of(&[tuned, base], &parameters, &dtype);
    let mut store = Store::beside(output, &digest)?;
    let resumed = store.done.len();
    let pool = build_pool(options.write.threads)?;
    task.expect(pairs.iter().map(Pair::bytes).sum());
    if let Err(error) = store.absorb(parts, &part_digest(&[tuned, base], &parameters, &dtype)) {
        store.keep();
        return Err(error);
    }
    let names: Vec<&Pair<'_>> = pairs.iter().collect();
    let done = pool.install(|| ask.examine_all(&names, options.seed, &dtype, &mut store, task));
    if let Err(error) = done {
        if matches!(error, Error::Cancelled | Error::Io { .. }) {
            store.keep();
        }
        return Err(error);
    }
    let spent = ask.spend(&pairs, &store, &dtype)?;
    let work =
        result::Work { pairs: &pairs, store: &store, ask, dtype: &dtype, spent, holds_whole };
    let finished = pool.install(|| work.finish(tuned, base, options, place, parameters, task));
    let mut report = finished?;
    report.resumed = resumed;
    Ok(report)
}

/// What an extraction has left to look at.
#[derive(Debug, Clone, Serialize)]
pub struct ExtractPlan {
    /// Of the checkpoints and all that is asked for; whoever looks at a part has to come to the same.
    pub digest: String,
    /// The parameters that no earlier call finished, and the bytes of each in both checkpoints.
    pub left: Vec<(String, u64)>,
}

/// Tells what an extraction has to look at, after it takes what other processes finished. The arguments
/// are those of [`extract`].
///
/// # Errors
/// As [`extract`].
pub fn plan_extraction(
    tuned: &Checkpoint,
    base: &Checkpoint,
    output: &Path,
    options: &ExtractOptions,
    parts: &[PathBuf],
) -> Result<ExtractPlan> {
    Ask::of(options)?;
    Output::check(output, &options.write)?;
    let weights = [QuantizedWeights::of(tuned), QuantizedWeights::of(base)];
    let Prepared { pairs, dtype, .. } = Prepared::of([tuned, base], &weights, options)?;
    let parameters = parameters(options);
    let mut store = Store::beside(output, &digest_of(&[tuned, base], &parameters, &dtype))?;
    store.keep();
    let digest = part_digest(&[tuned, base], &parameters, &dtype);
    store.absorb(parts, &digest)?;
    let left = pairs.iter().filter(|pair| !store.done.contains_key(&pair.name));
    Ok(ExtractPlan { digest, left: left.map(|pair| (pair.name.clone(), pair.bytes())).collect() })
}

/// Looks at some parameters and leaves what is found of them in a directory of its own, which is for
/// [`extract`] to take.
///
/// # Errors
/// As [`extract`]; [`Error::Plan`] if the checkpoints are not those of the digest.
pub fn extract_part(
    tuned: &Checkpoint,
    base: &Checkpoint,
    (digest, names): (&str, &[String]),
    directory: &Path,
    options: &ExtractOptions,
    task: &Task,
) -> Result<()> {
    let ask = Ask::of(options)?;
    let weights = [QuantizedWeights::of(tuned), QuantizedWeights::of(base)];
    let Prepared { pairs, dtype, .. } = Prepared::of([tuned, base], &weights, options)?;
    let own = part_digest(&[tuned, base], &parameters(options), &dtype);
    if own != digest {
        return Err(Error::Plan(vec![format!(
            "{} or {}, or lorafast, is not what the extraction was planned with; start it again",
            tuned.path().display(),
            base.path().display()
        )]));
    }
    let mut store = Store::open(directory.to_path_buf(), digest)?;
    store.keep();
    let pool = build_pool(options.write.threads)?;
    let wanted: Vec<&Pair<'_>> = pairs.iter().filter(|pair| names.contains(&pair.name)).collect();
    task.expect(wanted.iter().map(|pair| pair.bytes()).sum());
    pool.install(|| ask.examine_all(&wanted, options.seed, &dtype, &mut store, task))
}

/// The parameters of both checkpoints, side by side, and what is to become of them.
struct Prepared<'a> {
    pairs: Vec<Pair<'a>>,
    /// Of the factors.
    dtype: Dtype,
    /// Whether the format holds whole parameters.
    holds_whole: bool,
}

impl<'a> Prepared<'a> {
    fn of(
        [tuned, base]: [&'a Checkpoint; 2],
        [own, others]: &'a [QuantizedWeights; 2],
        options: &ExtractOptions,
    ) -> Result<Self> {
        let [holds_whole, holds_embeddings, holds_convolutions, holds_experts] =
            convert::holds(options.write.target()?)?;
        let tables = match options.embeddings.as_deref() {
            None | Some("save") if holds_whole => Tables::Whole,
            None | Some("save" | "factors") => Tables::Factors,
            Some("skip") => Tables::Skipped,
            Some(other) => {
                return Err(Error::Argument(format!(
                    "embeddings is {other:?}; it is \"save\", \"factors\" or \"skip\""
                )));
            }
        };
        refuse_same_files(tuned, base)?;
        let mut pairs = pairs::pairs((tuned, own), (base, others), tables, holds_experts)?;
        pairs::settle(&mut pairs);
        for pair in &mut pairs {
            use crate::adapter::LayerKind::{Convolution, Embedding};
            pair.part = match pair.part {
                Part::Whole | Part::Bias if !holds_whole => Part::Other,
                Part::Factors { kind: Embedding, .. } if !holds_embeddings => Part::Other,
                Part::Factors { kind: Convolution, .. } if !holds_convolutions => Part::Other,
                part => part,
            };
        }
        let dtype = match options.write.dtype()? {
            Some(dtype) => dtype,
            None => widest(&pairs),
        };
        Ok(Self { pairs, dtype, holds_whole })
    }
}

fn parameters(options: &ExtractOptions) -> Map<String, Value> {
    let given = json!({
        "rank": if options.rank.is_null() { json!("auto") } else { options.rank.clone() },
        "max_rank": options.max_rank,
        "seed": options.seed,
        "embeddings": options.embeddings,
        "to": options.write.to,
    });
    match given {
        Value::Object(fields) => fields,
        _ => unreachable!("an object was written down"),
    }
}

/// The narrowest type of factors that holds what both are stored in.
fn widest(pairs: &[Pair<'_>]) -> Dtype {
    let factors = pairs.iter().filter(|pair| matches!(pair.part, Part::Factors { .. }));
    let types = factors.flat_map(|pair| [pair.tuned.dtype(), pair.base.dtype()]);
    match types.reduce(|one, other| common(&one, &other)) {
        Some(dtype @ (Dtype::F16 | Dtype::Bf16 | Dtype::F64)) => dtype,
        _ => Dtype::F32,
    }
}

fn refuse_same_files(tuned: &Checkpoint, base: &Checkpoint) -> Result<()> {
    let identities = |checkpoint: &Checkpoint| -> Vec<(u64, u64)> {
        checkpoint.shards().iter().map(|shard| shard.file.stamp().identity).collect()
    };
    let same_files = identities(tuned) == identities(base) && identities(tuned) != [(0, 0)];
    if same_files || tuned.path() == base.path() {
        return Err(Error::Argument(format!(
            "{} and {} are the same files: the tuned model is compared with the base that it was made \
             from",
            tuned.path().display(),
            base.path().display()
        )));
    }
    Ok(())
}

/// Tells one extraction from others: files by their sizes, times and headers, and all that is asked.
fn digest_of(inputs: &[&Checkpoint], parameters: &Map<String, Value>, dtype: &Dtype) -> String {
    digest_with(inputs, parameters, dtype, &|stamp| format!("{stamp:?}"))
}

/// The same for processes on other machines, where a file has another device.
fn part_digest(inputs: &[&Checkpoint], parameters: &Map<String, Value>, dtype: &Dtype) -> String {
    digest_with(inputs, parameters, dtype, &|stamp| format!("{} {}", stamp.length, stamp.modified))
}

fn digest_with(
    inputs: &[&Checkpoint],
    parameters: &Map<String, Value>,
    dtype: &Dtype,
    text_of: &dyn Fn(Stamp) -> String,
) -> String {
    let mut text = format!("{} {dtype} {}\n", env!("CARGO_PKG_VERSION"), json!(parameters));
    for input in inputs {
        for shard in input.shards() {
            let stamp = text_of(shard.file.stamp());
            let header = sha256_of_bytes(shard.file.header_bytes());
            text += &format!("{} {stamp} {header}\n", shard.name);
        }
        text.push('\n');
    }
    sha256_of_bytes(text.as_bytes())
}

impl Ask {
    fn of(options: &ExtractOptions) -> Result<Self> {
        let rule = match &options.rank {
            Value::Null => Rule::Auto,
            given => Rule::parse(given)?,
        };
        if matches!(rule, Rule::SvCumulative(_)) {
            return Err(Error::Argument(
                "sv_cumulative needs every singular value, and an extraction computes the leading ones; \
                 energy:… says nearly the same"
                    .to_owned(),
            ));
        }
        match options.max_rank {
            Some(0) => Err(Error::Argument("max_rank is 0, which would leave nothing".to_owned())),
            most => Ok(Self { rule, max_rank: most.map(|most| most as usize) }),
        }
    }

    /// The largest rank that is asked for.
    fn most(self) -> usize {
        let own = match self.rule {
            Rule::Fixed(rank) => rank as usize,
            Rule::Budget(..) => BUDGET_RANK,
            _ => LARGEST_RANK,
        };
        match self.rule {
            Rule::Fixed(_) => self.max_rank.map_or(own, |most| most.min(own)),
            _ => self.max_rank.unwrap_or(own),
        }
    }

    /// How many leading singular values the rule keeps, of those that are known; all of them where it
    /// would keep more.
    fn choose(self, values: &[f64], total: f64, floor: f64) -> usize {
        /// So that rounding does not decide.
        const TOLERANCE: f64 = 1e-9;
        /// How well Σσ² is known against ‖D‖².
        const EXACT: f64 = 1e-12;
        if total == 0.0 {
            return 0;
        }
        let reaching = |target: f64| {
            let mut sum = 0.0;
            let found = values.iter().position(|value| {
                sum += value * value;
                sum >= target * (1.0 - TOLERANCE)
            });
            found.map_or(values.len(), |index| index + 1)
        };
        match self.rule {
            Rule::Fixed(rank) => values.len().min(rank as usize),
            Rule::Budget(..) => values.len(),
            Rule::Auto => values.iter().take_while(|value| **value > floor).count(),
            Rule::Energy(share) => reaching(share * total),
            Rule::SvFro(share) => reaching(share * share * total),
            Rule::Error(error) => {
                // A small error is told by what is left, as far as the values are right.
                let most = error * error * total * (1.0 + TOLERANCE) + EXACT * total;
                let mut left = total;
                let found = values.iter().position(|value| {
                    left -= value * value;
                    left <= most
                });
                found.map_or(values.len(), |index| index + 1)
            }
            Rule::SvRatio(ratio) => {
                values.iter().take_while(|value| **value * ratio > values[0]).count()
            }
            Rule::SvCumulative(_) => values.len(),
        }
    }

    /// The triplets that the rule needs, and its rank.
    fn triplets(
        self,
        matrix: &dyn Source,
        total: f64,
        floor: f64,
        key: u64,
    ) -> Result<(Leading, usize, bool)> {
        let most = self.most();
        let [rows, columns] = matrix.shape();
        let least = rows.min(columns);
        let is_sure = matches!(self.rule, Rule::Fixed(_) | Rule::Budget(..));
        let mut rank = if is_sure { most } else { most.min(FIRST_RANK) };
        loop {
            let width = rank + 8.max(rank / 4);
            let kept = |values: &[f64]| self.choose(values, total, floor).min(most);
            let found = leading(matrix, total, width, key, &kept)?;
            let wanted = self.choose(&found.spectrum.values, total, floor);
            let is_limited = !is_sure && wanted > most && self.max_rank.is_none();
            // The last of the values are not near enough to decide.
            if width >= least || wanted <= rank || rank == most {
                return Ok((found, wanted.min(most), is_limited));
            }
            rank = most.min(2 * rank);
        }
    }

    /// Looks at parameters that are not finished.
    fn examine_all(
        self,
        pairs: &[&Pair<'_>],
        seed: u64,
        dtype: &Dtype,
        store: &mut Store,
        task: &Task,
    ) -> Result<()> {
        let mut room = Vec::new();
        for pair in pairs {
            task.check()?;
            if store.done.contains_key(&pair.name) {
                task.advance(pair.bytes());
                continue;
            }
            let found = self.examine(pair, seed, dtype, store, &mut room, task)?;
            store.finish(found)?;
        }
        Ok(())
    }

    /// Looks at one parameter; what is kept of it lies in the store.
    fn examine(
        self,
        pair: &Pair<'_>,
        seed: u64,
        dtype: &Dtype,
        store: &mut Store,
        room: &mut Vec<f32>,
        task: &Task,
    ) -> Result<Done> {
        let name = pair.name.clone();
        if pair.has_grown() {
            task.advance(pair.bytes());
            return Ok(Done { name, differs: true, layer: None });
        }
        let Part::Factors { is_transposed, .. } = pair.part else {
            let differs = differ(&pair.tuned, &pair.base, task)?;
            return Ok(Done { name, differs, layer: None });
        };
        let rows = pair.tuned.shape[0] as usize;
        let columns = pair.tuned.shape[1..].iter().product::<u64>() as usize;
        if rows * columns == 0 {
            return Ok(Done { name, differs: false, layer: None });
        }
        let mut matrix = Difference::new(&pair.tuned, &pair.base, [rows, columns]);
        let (total, floor) = matrix.measure(room, task)?;
        if total == 0.0 {
            *room = matrix.into_room();
            return Ok(Done { name, differs: false, layer: None });
        }
        let (found, rank, is_limited) =
            self.triplets(&matrix, total, floor.bound, key(seed, &pair.key()))?;
        *room = matrix.into_room();
        let is_budget = matches!(self.rule, Rule::Budget(..));
        let own = factors(&found, rank, is_transposed);
        let stored = if is_budget { Dtype::F32 } else { dtype.clone() };
        let (place, lost) = match rank {
            0 => Default::default(),
            _ => {
                let rounded =
                    Rounded::of(&own, &stored).ok_or_else(|| too_large(&name, &stored))?;
                let lost = rounding_error(&own, &rounded.factors(&own));
                (store.put(&rounded.b, &rounded.a)?, lost)
            }
        };
        let spectrum = found.spectrum;
        let (floor, mean_floor) = (floor.bound, floor.mean);
        let layer = Layer { spectrum, floor, mean_floor, is_limited, rank, lost, place };
        Ok(Done { name, differs: true, layer: Some(layer) })
    }

    /// The ranks that a budget gives to the layers that differ, in their order.
    fn spend(
        self,
        pairs: &[Pair<'_>],
        store: &Store,
        dtype: &Dtype,
    ) -> Result<Option<(IndexMap<String, usize>, BudgetReport)>> {
        let Rule::Budget(measure, amount) = self.rule else { return Ok(None) };
        // Experts of one parameter have one rank.
        let mut parameters = IndexMap::<&str, Vec<(&Pair<'_>, &Layer)>>::new();
        for pair in pairs {
            let Some(layer) = &store.done[&pair.name].layer else { continue };
            parameters.entry(pair.title()).or_default().push((pair, layer));
        }
        let candidates: Vec<Candidate> = (parameters.values())
            .map(|own| {
                let (pair, _) = own[0];
                let count = pair.expert.map_or(1, |expert| expert.count);
                let elements = pair.extents().iter().sum::<usize>() as u64 * count;
                let values = || own.iter().map(|(_, layer)| &layer.spectrum.values[..layer.rank]);
                let longest = values().map(<[f64]>::len).max().unwrap_or(0);
                let square = |values: &[f64], k: usize| values.get(k).map_or(0.0, |own| own * own);
                Candidate {
                    worth: (0..longest)
                        .map(|k| values().map(|values| square(values, k)).sum())
                        .collect(),
                    cost: match measure {
                        Measure::Ranks => 1,
                        Measure::Parameters => elements,
                        Measure::Bytes => elements * dtype.size() as u64,
                    },
                }
            })
            .collect();
        let Spent { ranks, cost, gap } = within(&candidates, amount);
        if cost == 0 && !candidates.is_empty() {
            return Err(Error::Argument(format!(
                "a budget of {amount} {} leaves room for nothing: one rank of the smallest module takes {}",
                measure.name(),
                candidates.iter().map(|one| one.cost).min().unwrap_or(0)
            )));
        }
        let report = BudgetReport { measure: measure.name(), amount, spent: cost, gap };
        let ranks = parameters.into_values().zip(ranks).flat_map(|(own, rank)| {
            own.into_iter().map(move |(pair, layer)| (pair.name.clone(), layer.rank.min(rank)))
        });
        Ok(Some((ranks.collect(), report)))
    }
}

/// The leading singular triplets of a matrix with ‖D‖² = `total`, how many of them a rule keeps, and whether
/// it would keep more than it may.
///
/// # Errors
/// Those of reading the matrix.
pub(super) fn leading_of(
    matrix: &dyn Source,
    rule: Rule,
    max_rank: Option<u64>,
    total: f64,
    name: &str,
) -> Result<(Decomposed<'static>, usize, bool)> {
    let ask = Ask { rule, max_rank: max_rank.map(|most| most as usize) };
    let (found, rank, is_limited) = ask.triplets(matrix, total, 0.0, key(0, name))?;
    let values = found.spectrum.values;
    let rank = rank.clamp(1, values.len());
    Ok((Decomposed::explicit(found.left, values, found.right), rank, is_limited))
}

fn too_large(name: &str, dtype: &Dtype) -> Error {
    Error::Argument(format!("{name} has values too large for {dtype}; write it in a wider type"))
}

/// Balanced factors of the first triplets; of the transpose, where the weight is stored so.
fn factors(found: &Leading, rank: usize, is_transposed: bool) -> Factors {
    let scaled = |side: &Rows| {
        let mut result = Rows::zeros(side.rows, rank);
        let width = side.columns;
        for (target, row) in
            result.values.chunks_exact_mut(rank.max(1)).zip(side.values.chunks_exact(width))
        {
            for ((target, value), sigma) in target.iter_mut().zip(row).zip(&found.spectrum.values) {
                *target = value * sigma.sqrt();
            }
        }
        result
    };
    let (mut left, mut right) = (scaled(&found.left), scaled(&found.right));
    if is_transposed {
        std::mem::swap(&mut left, &mut right);
    }
    if rank > 0 {
        fix_signs(&mut left, &mut right);
    }
    Factors { b: left, a: right.transposed() }
}
