//! The drift of an update from one checkpoint to the next.

use rayon::prelude::*;
use serde::Serialize;

use super::collection::Collection;
use super::load::{Factors, Reader};
use crate::error::Result;
use crate::measure::overlap::{SingularBases, difference_norm};
use crate::measure::spectrum::Spectrum;
use crate::parallel::task::Task;

/// A checkpoint on its way. Subspaces are compared by φ = ‖UᵢᵀUⱼ‖²/min(i, j) (Hu et al. 2021,
/// LoRA, §7.2) at full rank, of outputs and inputs, and averaged over the modules.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Drift {
    /// The mean over the modules of exp H(σ/Σσ) (Roy & Vetterli 2007).
    pub effective_rank: f64,
    /// ‖X − P‖ with P the checkpoint before; `None` for the first.
    pub change: Option<f64>,
    /// φ with the checkpoint before, of outputs and of inputs.
    pub previous: Option<[f64; 2]>,
    /// φ with the last checkpoint, of outputs and of inputs.
    pub last: [f64; 2],
}

/// What is summed up over modules.
#[derive(Clone, Copy, Default)]
struct Sums {
    effective_rank: f64,
    change: f64,
    previous: [f64; 2],
    last: [f64; 2],
    modules: usize,
    with_previous: usize,
    with_last: usize,
}

/// Goes along some members of a collection in the order given, on the given threads. Progress is
/// counted in modules.
///
/// # Errors
/// [`crate::Error::Io`], [`crate::Error::Adapter`] for a file that was changed meanwhile,
/// [`crate::Error::Cancelled`].
pub fn drift(
    collection: &Collection,
    order: &[usize],
    pool: &rayon::ThreadPool,
    task: &Task,
) -> Result<Vec<Drift>> {
    task.expect(collection.modules.len() as u64);
    let modules: Vec<Vec<Sums>> = pool.install(|| {
        (0..collection.modules.len())
            .into_par_iter()
            .map(|module| {
                let sums = along(collection, order, module, task);
                task.advance(1);
                sums
            })
            .collect::<Result<_>>()
    })?;
    let steps = (0..order.len()).map(|step| {
        let mut all = Sums::default();
        for sums in modules.iter().map(|steps| steps[step]) {
            all.effective_rank += sums.effective_rank;
            all.change += sums.change;
            for side in 0..2 {
                all.previous[side] += sums.previous[side];
                all.last[side] += sums.last[side];
            }
            all.modules += sums.modules;
            all.with_previous += sums.with_previous;
            all.with_last += sums.with_last;
        }
        let mean = |sums: [f64; 2], count: usize| sums.map(|sum| sum / count as f64);
        Drift {
            effective_rank: all.effective_rank / all.modules as f64,
            change: (step > 0).then(|| all.change.sqrt()),
            previous: (step > 0).then(|| mean(all.previous, all.with_previous)),
            last: mean(all.last, all.with_last),
        }
    });
    Ok(steps.collect())
}

fn along(
    collection: &Collection,
    order: &[usize],
    module: usize,
    task: &Task,
) -> Result<Vec<Sums>> {
    let info = &collection.modules[module];
    let mut factors: Vec<Option<(Factors<f64>, usize)>> = Vec::new();
    for &position in order {
        task.check()?;
        let member = &collection.members[position];
        let piece = member.piece(module);
        let read = |piece: &super::collection::Piece| {
            Ok((Reader::new(member)?.factors::<f64>(piece)?, piece.rank))
        };
        factors.push(piece.map(read).transpose()?);
    }
    let updates = factors
        .iter()
        .map(|factors| match factors {
            Some((factors, rank)) => factors.update(info.rows, info.columns, *rank),
            None => crate::measure::spectrum::Update::sum(info.rows, info.columns, Vec::new()),
        })
        .collect::<Result<Vec<_>>>()?;
    let mut bases = Vec::new();
    for (update, factors) in updates.iter().zip(&factors) {
        task.check()?;
        let bases_of = || SingularBases::of(update).filter(|bases| bases.rank() > 0);
        bases.push(factors.as_ref().and_then(|_| bases_of()));
    }
    let similarity = |x: usize, y: usize| -> Result<Option<[f64; 2]>> {
        let (Some(x), Some(y)) = (&bases[x], &bases[y]) else { return Ok(None) };
        let sizes = (x.rank(), y.rank());
        let phi = |table: crate::measure::overlap::SubspaceSimilarity| table.phi(sizes.0, sizes.1);
        let sides = (phi(x.left_similarity(y)?), phi(x.right_similarity(y)?));
        Ok(sides.0.zip(sides.1).map(|(output, input)| [output.min(1.0), input.min(1.0)]))
    };
    let mut steps = Vec::with_capacity(order.len());
    for (step, update) in updates.iter().enumerate() {
        task.check()?;
        let mut sums = Sums::default();
        if bases[step].is_some() {
            sums.effective_rank = Spectrum::of(update).effective_rank;
            sums.modules = 1;
        }
        if step > 0 {
            if update.rank() + updates[step - 1].rank() > 0 {
                sums.change = difference_norm(update, &updates[step - 1])?.powi(2);
            }
            if let Some(values) = similarity(step, step - 1)? {
                (sums.previous, sums.with_previous) = (values, 1);
            }
        }
        if let Some(values) = similarity(step, order.len() - 1)? {
            (sums.last, sums.with_last) = (values, 1);
        }
        steps.push(sums);
    }
    Ok(steps)
}
