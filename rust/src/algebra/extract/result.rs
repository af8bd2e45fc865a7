//! The adapter that an extraction makes of what it found.

use std::sync::Arc;

use indexmap::{IndexMap, IndexSet};

use super::pairs::{Pair, Part};
use super::store::{Layer, Store};
use super::*;
use crate::adapter::deltas::LowRank;
use crate::adapter::{Adapter, Contents, Grammar, LayerKind, Module, Saved, Semantics};
use crate::algebra::report::{Record, overall};
use crate::error::Owner;
use crate::kernel::convert::widen_f64;
use crate::tensor::safetensors::{Tensor, TensorFile};

/// What was found of all parameters.
pub(super) struct Work<'a> {
    pub pairs: &'a [Pair<'a>],
    pub store: &'a Store,
    pub ask: Ask,
    pub dtype: &'a Dtype,
    pub spent: Option<(IndexMap<String, usize>, BudgetReport)>,
    pub holds_whole: bool,
}

/// Modules, and where each one's factors begin.
type Made<'a> = Vec<(&'a Pair<'a>, LayerKind, usize, u64)>;

impl Work<'_> {
    pub fn finish(
        &self,
        tuned: &Checkpoint,
        base: &Checkpoint,
        options: &ExtractOptions,
        place: Output<'_>,
        mut parameters: Map<String, Value>,
        task: &Task,
    ) -> Result<ExtractReport> {
        let is_dry = options.write.dry_run;
        let mut records = IndexMap::new();
        let mut extraction = IndexMap::new();
        let mut made: Made<'_> = Vec::new();
        let mut limited = Vec::new();
        let mut behind = 0;
        for pair in self.pairs {
            let (Some(layer), Part::Factors { kind, .. }) =
                (&self.store.done[&pair.name].layer, pair.part)
            else {
                continue;
            };
            let module = pair.module().to_owned();
            let rank = match &self.spent {
                Some((ranks, _)) => ranks[&pair.name],
                None => layer.rank,
            };
            let (lost, start) = match &self.spent {
                Some(_) if rank > 0 => {
                    let (cut, lost) = self.cut(pair, layer, rank)?;
                    let start = self.store.put_behind(&cut, behind)?;
                    behind += cut.len() as u64;
                    (lost, start)
                }
                _ => (layer.lost, layer.place.start),
            };
            if layer.is_limited {
                limited.push(module.clone());
            }
            let (record, own) = describe(pair, layer, rank, lost);
            if rank > 0 {
                made.push((pair, kind, rank, start));
            }
            records.insert(module.clone(), record);
            extraction.insert(module, own);
        }
        let (saved, lost) = self.others(options.strict, tuned)?;
        let unchanged = self.store.done.values().filter(|done| !done.differs).count();
        let mut notes = self.notes(&records, &limited, &saved);
        if made.is_empty() && saved.is_empty() {
            return Err(Error::Argument(self.nothing(tuned, base, &lost, !records.is_empty())));
        }
        notes.extend([tuned, base].iter().flat_map(|input| input.notes().iter().cloned()));
        let bytes = records.values().map(|record: &Record| {
            ((record.shape[0] + record.shape[1]) * record.rank * self.dtype.size()) as u64
        });
        let mut report = Report {
            target_format: options.write.target()?.to_owned(),
            dtype: self.dtype.torch_name().unwrap_or(self.dtype.name()).to_owned(),
            error: overall(records.values()),
            bytes: bytes.sum(),
            modules: records,
            budget: self.spent.as_ref().map(|(_, budget)| budget.clone()),
            lost,
            notes,
            files: Vec::new(),
        };
        if !is_dry {
            let value = self.adapter(&made, &saved, base)?;
            parameters.insert("dtype".to_owned(), report.dtype.clone().into());
            let (one, other) = rayon::join(|| described(tuned), || described(base));
            let inputs = vec![one?, other?];
            place.write_value(
                &Arc::new(value),
                inputs,
                Some(base),
                ("extract", parameters),
                task,
                &mut report,
            )?;
            tuned.check_unchanged()?;
            base.check_unchanged()?;
        }
        let saved = saved.iter().map(|pair| pair.name.clone()).collect();
        Ok(ExtractReport { report, extraction, saved, unchanged, resumed: 0 })
    }

    /// The first triplets of those that are stored, in the type that is written, and what rounding loses.
    fn cut(&self, pair: &Pair<'_>, layer: &Layer, rank: usize) -> Result<(Vec<u8>, f64)> {
        let [b, a] = self.store.get(layer.place)?.map(|bytes| widen_f64(&Dtype::F32, &bytes));
        let (rows, columns) = (b.len() / layer.rank, a.len() / layer.rank);
        let mut left = Rows::zeros(rows, rank);
        for (target, row) in left.values.chunks_exact_mut(rank).zip(b.chunks_exact(layer.rank)) {
            target.copy_from_slice(&row[..rank]);
        }
        let right = Rows { rows: rank, columns, values: a[..rank * columns].to_vec() };
        let own = Factors { b: left, a: right };
        let rounded =
            Rounded::of(&own, self.dtype).ok_or_else(|| too_large(&pair.name, self.dtype))?;
        let lost = rounding_error(&own, &rounded.factors(&own));
        let mut bytes = rounded.b;
        bytes.extend(rounded.a);
        Ok((bytes, lost))
    }

    /// The parameters that are written whole, and in words those that cannot be written.
    fn others(&self, strict: bool, tuned: &Checkpoint) -> Result<(Vec<&Pair<'_>>, Vec<String>)> {
        let differs = |pair: &&Pair<'_>| self.store.done[&pair.name].differs;
        let is_part = |pair: &Pair<'_>, part| pair.part == part;
        let modules: IndexSet<&str> = (self.pairs.iter())
            .filter(|pair| is_part(pair, Part::Whole))
            .filter(differs)
            .map(Pair::module)
            .collect();
        let saved: Vec<&Pair<'_>> = (self.pairs.iter())
            .filter(|pair| match pair.part {
                Part::Whole => modules.contains(pair.module()),
                Part::Bias => differs(pair),
                _ => false,
            })
            .collect();
        let lost: Vec<String> = (self.pairs.iter())
            .filter(|pair| is_part(pair, Part::Other))
            .filter(differs)
            .map(|pair| pair.name.clone())
            .collect();
        let refused: Vec<&str> = (saved.iter())
            .filter(|pair| !pairs::is_table(&pair.name))
            .map(|pair| pair.name.as_str())
            .chain(lost.iter().map(String::as_str))
            .collect();
        if strict && !refused.is_empty() {
            return Err(Error::unsupported(
                tuned.path(),
                format!(
                    "differs from its base in {} parameters that no product of factors can say: {}; \
                     without strict they are saved whole where the format can",
                    refused.len(),
                    some(&refused)
                ),
            ));
        }
        let lost = match lost.as_slice() {
            [] => Vec::new(),
            names => vec![format!(
                "{} parameters that differ and that an adapter in this format cannot say: {}",
                names.len(),
                some(&names.iter().map(String::as_str).collect::<Vec<_>>())
            )],
        };
        Ok((saved, lost))
    }

    fn notes(
        &self,
        records: &IndexMap<String, Record>,
        limited: &[String],
        saved: &[&Pair<'_>],
    ) -> Vec<String> {
        let mut notes = Vec::new();
        let below: Vec<&str> = (records.iter())
            .filter(|(_, record)| record.rank == 0)
            .map(|(name, _)| name.as_str())
            .collect();
        if let [first, ..] = below.as_slice() {
            let why = match self.ask.rule {
                Rule::Auto => "rounding explains all that differs in them",
                _ => "the budget leaves them nothing",
            };
            notes.push(format!(
                "{} modules are left out with rank 0: {why} (the first: {first})",
                below.len()
            ));
        }
        if let [first, ..] = limited {
            notes.push(format!(
                "{} modules have the largest rank, {}, where the rule asks for more (the first: \
                 {first}); max_rank sets another",
                limited.len(),
                self.ask.most()
            ));
        }
        for pair in saved.iter().filter(|pair| pair.has_grown()) {
            notes.push(format!(
                "{} has {} rows and in the base {}; resize the base's tables before the adapter is \
                 loaded",
                pair.name, pair.tuned.shape[0], pair.base.shape[0]
            ));
        }
        let experts = saved.iter().find(|pair| pair.tuned.shape.len() == 3);
        if let Some(pair) = experts {
            notes.push(format!("stacked weights are saved whole (the first: {})", pair.name));
        }
        notes
    }

    /// Why there is nothing to write.
    fn nothing(
        &self,
        tuned: &Checkpoint,
        base: &Checkpoint,
        lost: &[String],
        has_layers: bool,
    ) -> String {
        let (tuned, base) = (tuned.path().display(), base.path().display());
        match (has_layers, lost) {
            (true, _) => format!(
                "nothing would be left: rounding explains all that differs between {tuned} and {base}; \
                 a number as rank keeps it nevertheless"
            ),
            (false, [lost, ..]) => format!("{tuned} and {base} differ only in {lost}"),
            (false, []) => format!("{tuned} and {base} do not differ: there is nothing to extract"),
        }
    }

    fn adapter(&self, made: &Made<'_>, saved: &[&Pair<'_>], base: &Checkpoint) -> Result<Adapter> {
        let mut wanted = Vec::new();
        for (pair, kind, rank, start) in made {
            let rank = *rank as u64;
            let (mut outputs, mut inputs) = (pair.tuned.shape[0], pair.tuned.shape[1..].to_vec());
            if let Part::Factors { is_transposed: true, .. } = pair.part {
                (outputs, inputs) = (inputs[0], vec![outputs]);
            }
            let ones = if *kind == LayerKind::Convolution { inputs.len() - 1 } else { 0 };
            let b: Vec<u64> =
                [outputs, rank].into_iter().chain(std::iter::repeat_n(1, ones)).collect();
            let a: Vec<u64> = std::iter::once(rank).chain(inputs).collect();
            let bytes = outputs * rank * self.dtype.size() as u64;
            let name = |what: &str| format!("{}.{what}", pair.module());
            wanted.push((name("b"), self.dtype.clone(), b, *start));
            wanted.push((name("a"), self.dtype.clone(), a, start + bytes));
        }
        let tensors = self.store.tensors(wanted)?;
        let mut modules = IndexMap::new();
        let mut stored_transposed = !made.is_empty();
        for ((pair, kind, rank, _), factors) in made.iter().zip(tensors.chunks_exact(2)) {
            let [b, a] = factors else { unreachable!("two of each") };
            let path = pair.module().to_owned();
            let transposed = matches!(pair.part, Part::Factors { is_transposed: true, .. });
            stored_transposed &= transposed && *kind == LayerKind::Linear;
            let module = Module {
                key: path.clone(),
                path: path.clone(),
                parameters: Vec::new(),
                kind: *kind,
                delta: Arc::new(LowRank { a: a.clone(), b: b.clone(), diagonal: None }),
                scale: None,
                magnitude: None,
                bias: None,
                rank: *rank as u64,
                alpha: *rank as f64,
                scaling: 1.0,
            };
            modules.insert(path, module);
        }
        let mut opened = IndexMap::new();
        let mut whole = Vec::with_capacity(saved.len());
        for pair in saved {
            let trained_apart = pair.part == Part::Whole;
            let tensor = saved_tensor(pair, &mut opened)?;
            whole.push(Saved { path: pair.name.clone(), tensor, trained_apart });
        }
        let any = tensors.first().or_else(|| whole.first().map(|saved| &saved.tensor));
        let file = any.expect("there is something to write").file().clone();
        let saves_embeddings = saved.iter().any(|pair| pairs::is_embedding(&pair.name));
        let semantics = Semantics {
            stored_transposed,
            ties_weights: base.ties_embeddings() && saves_embeddings && self.holds_whole,
            base: base
                .config()
                .and_then(|config| config.get("_name_or_path")?.as_str().map(str::to_owned)),
            ..Semantics::default()
        };
        Ok(Adapter::new(Contents {
            path: self.pairs[0].tuned.checkpoint.path().to_path_buf(),
            format: "peft",
            file,
            modules,
            saved: whole,
            rows: Vec::new(),
            others: Vec::new(),
            notes: Vec::new(),
            semantics,
            grammar: Grammar::Dotted,
            fields: Vec::new(),
            settings: Map::new(),
            summary: IndexMap::new(),
            read_from: Vec::new(),
            directory: None,
        }))
    }
}

/// A parameter of the tuned model as a tensor that reads itself.
fn saved_tensor(pair: &Pair<'_>, opened: &mut IndexMap<usize, Arc<TensorFile>>) -> Result<Tensor> {
    let weight = &pair.tuned;
    let difference::Stored::Plain(location) = weight.stored else {
        let bytes = weight.read()?;
        let path = weight.checkpoint.path();
        return Tensor::in_memory(path, &pair.name, Dtype::F32, weight.shape.clone(), bytes);
    };
    let file = match opened.get(&location.shard) {
        Some(file) => file.clone(),
        None => {
            let shard = &weight.checkpoint.shards()[location.shard];
            let store = weight.checkpoint.store();
            let mut file = TensorFile::open_in(store, &shard.name, Owner::Checkpoint)?;
            file.name_under(&shard.prefix);
            let file = Arc::new(file);
            opened.insert(location.shard, file.clone());
            file
        }
    };
    let info = weight.checkpoint.at(location).clone();
    Ok(Tensor::new(file, info))
}

fn describe(pair: &Pair<'_>, layer: &Layer, rank: usize, lost: f64) -> (Record, Extraction) {
    let spectrum = &layer.spectrum;
    let square = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
    let kept = square(&spectrum.values[..rank]);
    let norm = spectrum.total.sqrt();
    let tail = (spectrum.total - kept).max(0.0).sqrt();
    let above = spectrum.values.iter().take_while(|value| **value > layer.floor).count();
    let mut shape =
        [pair.tuned.shape[0] as usize, pair.tuned.shape[1..].iter().product::<u64>() as usize];
    if let Part::Factors { is_transposed: true, .. } = pair.part {
        shape.reverse();
    }
    let record = Record {
        shape,
        source_rank: shape[0].min(shape[1]),
        rank,
        kept: kept / spectrum.total,
        error: if rank == 0 { 1.0 } else { tail.hypot(lost) / norm },
        norm,
        singular_values: spectrum.values.clone(),
        coefficients: None,
        expert_ranks: None,
    };
    let own = Extraction {
        floor: layer.floor,
        mean_floor: layer.mean_floor,
        energy_above: square(&spectrum.values[..above]) / spectrum.total,
        certificate: spectrum.certificate(rank),
    };
    (record, own)
}

/// An input as a provenance has it: every file of weights by its digest.
fn described(checkpoint: &Checkpoint) -> Result<Value> {
    use rayon::prelude::*;
    let digests: Vec<(String, String)> = (checkpoint.shards().par_iter())
        .map(|shard| Ok((shard.name.clone(), shard.file.sha256()?)))
        .collect::<Result<_>>()?;
    let files: Map<String, Value> =
        digests.into_iter().map(|(name, digest)| (name, digest.into())).collect();
    Ok(json!({"path": checkpoint.path().display().to_string(), "sha256": files}))
}

/// Some of many names, in words.
fn some(names: &[&str]) -> String {
    const LISTED: usize = 8;
    match names.len() {
        0..=LISTED => names.join(", "),
        count => format!("{} and {} more", names[..LISTED].join(", "), count - LISTED),
    }
}
