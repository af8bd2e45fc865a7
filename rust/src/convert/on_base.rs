//! Updates that only the base's weight makes, DoRA's among them: W′ − W of an adapter and of what was
//! written of it, held against each other in f64.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;

use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::execute::compute::{Computer, Prepared};
use crate::execute::queue;
use crate::kernel::InstructionSet;
use crate::parallel::task::{self, Task};
use crate::plan::{Inputs, Options, Plan, PlannedTensor};
use crate::tensor::dtype::Dtype;

/// Bytes of the rows that are computed together.
const WINDOW: usize = 1 << 20;

/// Sums of squares over a module's updates.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sums {
    pub difference: f64,
    pub norm: f64,
}

impl Sums {
    /// The difference as a share of the norm.
    pub fn relative(&self) -> f64 {
        match (self.difference, self.norm) {
            (0.0, _) => 0.0,
            (difference, norm) => (difference / norm).sqrt(),
        }
    }
}

/// An adapter on its base.
pub(super) struct OnBase {
    inputs: Inputs,
    plan: OnceLock<std::result::Result<Plan, String>>,
}

/// ‖ΔW − ΔW′‖/‖ΔW‖ of modules by their keys, or why there are none.
pub(super) type Errors = std::result::Result<HashMap<String, f64>, String>;

impl OnBase {
    pub fn new(base: &Checkpoint, adapter: Arc<Adapter>) -> Self {
        let inputs = Inputs { base: Arc::new(base.clone()), adapters: vec![adapter] };
        Self { inputs, plan: OnceLock::new() }
    }

    /// Of those modules of the adapter that change a tensor which the written one changes as well.
    ///
    /// # Errors
    /// That a file changed meanwhile, [`Error::Io`], [`Error::Cancelled`].
    pub fn errors(&self, back: Arc<Adapter>, keys: &HashSet<&str>, task: &Task) -> Result<Errors> {
        let own = match self.plan.get() {
            Some(plan) => plan,
            None => {
                let plan = planned(&self.inputs, task)?;
                self.plan.get_or_init(|| plan)
            }
        };
        let inputs = Inputs { base: self.inputs.base.clone(), adapters: vec![back] };
        let other = planned(&inputs, task)?;
        let (own, other) = match (own, &other) {
            (Ok(own), Ok(other)) => (own, other),
            (Err(reason), _) | (_, Err(reason)) => return Ok(Err(reason.clone())),
        };
        let others: HashMap<&str, &PlannedTensor> =
            changed(other).map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let has_key = |tensor: &PlannedTensor| {
            tensor.updates().iter().any(|update| keys.contains(update.module.as_str()))
        };
        let pairs: Vec<_> = changed(own)
            .filter(|tensor| has_key(tensor))
            .filter_map(|tensor| Some((tensor, *others.get(tensor.name.as_str())?)))
            .filter(|(one, other)| one.matrix() == other.matrix())
            .collect();
        let computer = |inputs| Computer { inputs, set: InstructionSet::detect(), task };
        let (one, two) = (computer(&self.inputs), computer(&inputs));
        let found: Vec<Vec<(&str, Sums)>> = task::build_pool(None)?.install(|| {
            pairs
                .par_iter()
                .map(|(tensor, other)| compare((one, tensor), (two, other), keys))
                .collect::<Result<_>>()
        })?;
        let mut sums = HashMap::<&str, Sums>::new();
        for (key, found) in found.into_iter().flatten() {
            let sum = sums.entry(key).or_default();
            sum.difference += found.difference;
            sum.norm += found.norm;
        }
        Ok(Ok(sums.into_iter().map(|(key, sum)| (key.to_owned(), sum.relative())).collect()))
    }
}

/// The plan of a merge that rounds nothing, or why there is none.
fn planned(inputs: &Inputs, task: &Task) -> Result<std::result::Result<Plan, String>> {
    let options = Options { dtype: Some(Dtype::F64), ..Options::default() };
    match Plan::new_with(inputs, options, task) {
        Ok(plan) => Ok(Ok(plan)),
        Err(
            error @ (Error::Plan(_)
            | Error::Unsupported { .. }
            | Error::Checkpoint { .. }
            | Error::Argument(_)),
        ) => {
            // What is written lies at that place for a moment only.
            let place = format!("{}: ", inputs.adapters[0].path().display());
            Ok(Err(error.to_string().replace(&place, "")))
        }
        Err(error) => Err(error),
    }
}

fn changed(plan: &Plan) -> impl Iterator<Item = &PlannedTensor> {
    plan.tensors().map(|(_, tensor)| tensor).filter(|tensor| !tensor.updates().is_empty())
}

/// The sums of each module of one tensor's.
fn compare<'a>(
    (one, tensor): (Computer<'_>, &'a PlannedTensor),
    (two, other): (Computer<'_>, &PlannedTensor),
    keys: &HashSet<&str>,
) -> Result<Vec<(&'a str, Sums)>> {
    let (rows, columns) = tensor.matrix();
    let (own, back) = (one.prepare_wide(tensor)?, two.prepare_wide(other)?);
    let updates = tensor.updates().iter().filter(|update| keys.contains(update.module.as_str()));
    let mut sums: Vec<(&str, Range<usize>, Sums)> = Vec::new();
    for update in updates {
        let own = match &update.slice.rows {
            Some(rows) => rows.start as usize..rows.end as usize,
            None => 0..rows,
        };
        if !sums.iter().any(|(key, rows, _)| *key == update.module && *rows == own) {
            sums.push((&update.module, own, Sums::default()));
        }
    }
    let window = (WINDOW / (columns * size_of::<f64>()).max(1)).max(1);
    let mut room: [Vec<f64>; 3] = Default::default();
    for start in (0..rows).step_by(window) {
        let window = start..rows.min(start + window);
        if !sums.iter().any(|(_, rows, _)| rows.start < window.end && window.start < rows.end) {
            continue;
        }
        one.task.check()?;
        let [weight, made, read] = &mut room;
        fill((one, tensor, &own), &window, weight, made)?;
        fill((two, other, &back), &window, weight, read)?;
        for (_, rows, sum) in &mut sums {
            let (from, to) = (rows.start.max(window.start), rows.end.min(window.end));
            if from < to {
                let place = (from - window.start) * columns..(to - window.start) * columns;
                let (weight, made) = (&weight[place.clone()], &made[place.clone()]);
                for ((weight, made), read) in weight.iter().zip(made).zip(&read[place]) {
                    sum.difference += (made - read) * (made - read);
                    sum.norm += (made - weight) * (made - weight);
                }
            }
        }
    }
    Ok(sums.into_iter().map(|(key, _, sum)| (key, sum)).collect())
}

/// Some rows of a tensor, as they are and as they become.
fn fill(
    (computer, tensor, prepared): (Computer<'_>, &PlannedTensor, &Prepared),
    window: &Range<usize>,
    weight: &mut Vec<f64>,
    made: &mut Vec<f64>,
) -> Result<()> {
    let columns = prepared.columns();
    weight.clear();
    made.clear();
    for tile in queue::tiles_covering(tensor, window) {
        let [before, after] = computer.wide_rows(tensor, prepared, &tile)?;
        // Tiles may begin a few rows before.
        let skipped = (window.start + made.len() / columns - tile.start) * columns;
        weight.extend_from_slice(&before[skipped..]);
        made.extend_from_slice(&after[skipped..]);
    }
    Ok(())
}
