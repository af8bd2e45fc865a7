//! The adapter that an extraction makes of what it found.

use std::sync::Arc;

use indexmap::{IndexMap, IndexSet};

use super::pairs::{Pair, Part};
use super::store::{Layer, Store};
use super::*;
use crate::adapter::deltas::LowRank;
use crate::adapter::{Adapter, Contents, Expert, Grammar, LayerKind, Module, Saved, Semantics};
use crate::algebra::report::{Record, overall};
use crate::algebra::stacks;
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

/// The factors of all experts of a parameter: of which, the rank, and where A and B begin.
struct Stacked<'a> {
    first: &'a Pair<'a>,
    rank: u64,
    starts: [u64; 2],
}

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
        let mut records = IndexMap::<String, Vec<(Option<Expert>, Record)>>::new();
        let mut extraction = IndexMap::<String, Vec<(f64, Extraction)>>::new();
        let mut made: Made<'_> = Vec::new();
        let mut limited = Vec::new();
        let mut behind = 0;
        for pair in self.pairs {
            let (Some(layer), Part::Factors { kind, .. }) =
                (&self.store.done[&pair.name].layer, pair.part)
            else {
                if pair.expert.is_some() {
                    let own = (pair.expert, unchanged_expert(pair));
                    records.entry(pair.title().to_owned()).or_default().push(own);
                }
                continue;
            };
            let module = pair.title().to_owned();
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
            if layer.is_limited && limited.last() != Some(&module) {
                limited.push(module.clone());
            }
            let (record, own) = describe(pair, layer, rank, lost);
            if rank > 0 {
                made.push((pair, kind, rank, start));
            }
            extraction.entry(module.clone()).or_default().push((record.norm, own));
            records.entry(module).or_default().push((pair.expert, record));
        }
        // Stacks in which no expert differs are no modules.
        records.retain(|_, own| {
            own.iter().any(|(expert, record)| expert.is_none() || record.norm > 0.0)
        });
        let counts: Vec<usize> = records.values().map(Vec::len).collect();
        let records: IndexMap<String, Record> =
            records.into_iter().map(|(name, own)| (name, stacks::record(own))).collect();
        let extraction =
            extraction.into_iter().map(|(name, own)| (name, Extraction::of_all(&own))).collect();
        let of_experts;
        (made, of_experts) = self.stacked(made, behind)?;
        let (saved, lost) = self.others(options.strict, tuned)?;
        let unchanged = self.store.done.values().filter(|done| !done.differs).count();
        let mut notes = self.notes(&records, &limited, &saved);
        if made.is_empty() && of_experts.is_empty() && saved.is_empty() {
            return Err(Error::Argument(self.nothing(tuned, base, &lost, !records.is_empty())));
        }
        notes.extend([tuned, base].iter().flat_map(|input| input.notes().iter().cloned()));
        let bytes = records.values().zip(counts).map(|(record, count)| {
            ((record.shape[0] + record.shape[1]) * record.rank * count * self.dtype.size()) as u64
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
            let value = self.adapter(&made, &of_experts, &saved, base)?;
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
            .filter(|pair| !pairs::is_table(&pair.named))
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

    /// The factors of experts brought together by their parameters, each with zeros up to the largest rank,
    /// behind all that is stored; the other modules as they are.
    fn stacked<'b>(&self, made: Made<'b>, mut behind: u64) -> Result<(Made<'b>, Vec<Stacked<'b>>)> {
        let mut others = Vec::with_capacity(made.len());
        let mut members = IndexMap::<&'b str, Made<'b>>::new();
        for one in made {
            match one.0.expert {
                Some(_) => members.entry(&one.0.named).or_default().push(one),
                None => others.push(one),
            }
        }
        let size = self.dtype.size();
        let mut stacks = Vec::with_capacity(members.len());
        for own in members.into_values() {
            let first = own[0].0;
            let count = first.expert.map_or(0, |expert| expert.count);
            let rank = own.iter().map(|(_, _, rank, _)| *rank).max().unwrap_or(0);
            let extents = first.extents();
            let mut starts = [0; 2];
            for (slot, start) in starts.iter_mut().enumerate() {
                let [outputs, inputs] = extents;
                for index in 0..count {
                    let extent = if slot == 0 { inputs } else { outputs };
                    let mut padded = vec![0; rank * extent * size];
                    if let Some((_, _, own, start)) =
                        own.iter().find(|one| one.0.expert.is_some_and(|own| own.index == index))
                    {
                        // B lies before A, whose rows are whole; of B each has room for the largest rank.
                        let place =
                            if slot == 0 { start + (outputs * own * size) as u64 } else { *start };
                        let stored = self.store.read(place, (own * extent * size) as u64)?;
                        let (from, to) = match slot {
                            0 => (stored.len(), padded.len()),
                            _ => (own * size, rank * size),
                        };
                        let rows = padded.chunks_exact_mut(to.max(1));
                        for (target, source) in rows.zip(stored.chunks_exact(from.max(1))) {
                            target[..from].copy_from_slice(source);
                        }
                    }
                    let at = self.store.put_behind(&padded, behind)?;
                    behind += padded.len() as u64;
                    if index == 0 {
                        *start = at;
                    }
                }
            }
            stacks.push(Stacked { first, rank: rank as u64, starts });
        }
        Ok((others, stacks))
    }

    fn adapter(
        &self,
        made: &Made<'_>,
        of_experts: &[Stacked<'_>],
        saved: &[&Pair<'_>],
        base: &Checkpoint,
    ) -> Result<Adapter> {
        let mut wanted = Vec::new();
        for Stacked { first, rank, starts } in of_experts {
            let count = first.expert.map_or(0, |expert| expert.count);
            let [outputs, inputs] = first.extents().map(|extent| extent as u64);
            let shapes = [vec![count, *rank, inputs], vec![count, outputs, *rank]];
            for ((what, shape), start) in ["experts.a", "experts.b"].iter().zip(shapes).zip(starts)
            {
                wanted.push((format!("{}.{what}", first.named), self.dtype.clone(), shape, *start));
            }
        }
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
        let (own, tensors_of_layers) = tensors.split_at(2 * of_experts.len());
        for (Stacked { first, .. }, factors) in of_experts.iter().zip(own.chunks_exact(2)) {
            let [a, b] = factors else { unreachable!("two of each") };
            let module = stacks::made(&first.named, [a.clone(), b.clone()], 1.0)?;
            modules.insert(module.key.clone(), module);
        }
        let factors_of_layers = tensors_of_layers.chunks_exact(2);
        for ((pair, kind, rank, _), factors) in made.iter().zip(factors_of_layers) {
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
            whole.push(Saved { path: pair.named.clone(), tensor, trained_apart });
        }
        let any = tensors.first().or_else(|| whole.first().map(|saved| &saved.tensor));
        let file = any.expect("there is something to write").file().clone();
        let saves_embeddings = saved.iter().any(|pair| pairs::is_embedding(&pair.named));
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

/// An expert in whose matrix nothing differs, beside others.
fn unchanged_expert(pair: &Pair<'_>) -> Record {
    Record {
        shape: pair.extents(),
        source_rank: 0,
        rank: 0,
        kept: 1.0,
        error: 0.0,
        norm: 0.0,
        singular_values: Vec::new(),
        coefficients: None,
        expert_ranks: None,
    }
}

fn describe(pair: &Pair<'_>, layer: &Layer, rank: usize, lost: f64) -> (Record, Extraction) {
    let spectrum = &layer.spectrum;
    let square = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
    let kept = square(&spectrum.values[..rank]);
    let norm = spectrum.total.sqrt();
    let tail = (spectrum.total - kept).max(0.0).sqrt();
    let above = spectrum.values.iter().take_while(|value| **value > layer.floor).count();
    let shape = pair.extents();
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
