//! The way of every computation: modules one by one on several threads, each with its record, then the
//! result in its format.

use std::ops::Range;

use indexmap::IndexMap;
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::options::Writing;
use super::report::{BudgetReport, Record, Report, overall};
use super::results::{Results, Written};
use super::rounding;
use super::stacks;
use super::sums::{Sum, Sums};
use super::whole::Combined;
use super::write::{Output, described};
use crate::adapter::{Adapter, Module};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::parallel::task::{Task, build_pool};
use crate::tensor::dtype::Dtype;

/// Elements of the matrices that are in memory together, of methods that make them: 256 MB in f32.
const DENSE_ELEMENTS: usize = 1 << 26;

/// A module that was computed: its record, and where its factors are, with the scale that they have.
pub(crate) type Done = (Record, Option<Written>);

/// What computes the modules.
pub(crate) trait Compute: Send + Sync {
    /// How often the factors are read.
    fn passes(&self) -> u64 {
        1
    }

    /// What has to be known of all modules before the first is computed.
    ///
    /// # Errors
    /// Those of reading, and of what cannot be computed.
    fn prepare(&mut self, _dtype: &Dtype, _task: &Task) -> Result<Option<BudgetReport>> {
        Ok(None)
    }

    /// The elements of the matrices that are made of a module, for methods that make some.
    fn elements(&self, _sum: &Sum<'_>) -> usize {
        0
    }

    /// What is made of updates of norms and biases, in that type.
    ///
    /// # Errors
    /// Those of reading, and of what cannot be computed.
    fn vectors(&self, _dtype: &Dtype, _task: &Task) -> Result<Vec<Module>> {
        Ok(Vec::new())
    }

    /// One module, rounded to that type, and put into the results where there are any.
    ///
    /// # Errors
    /// Those of reading, and of what cannot be computed.
    fn module(
        &self,
        index: usize,
        sum: &Sum<'_>,
        dtype: &Dtype,
        results: Option<&Results>,
        task: &Task,
    ) -> Result<Done>;
}

/// What a computation is done with.
pub(crate) struct Job<'a> {
    pub sums: &'a Sums<'a>,
    pub adapters: &'a [Adapter],
    pub base: Option<&'a Checkpoint>,
    pub verb: &'static str,
    pub parameters: Map<String, Value>,
    pub notes: Vec<String>,
    /// Whether alphas are written for a scale of α/√r, where the format can say so.
    pub rank_stabilized: bool,
    /// What is written of the parameters that were trained whole.
    pub whole: Whole,
}

/// Parameters that were trained whole, and trained rows.
pub(crate) enum Whole {
    /// Those of the only adapter.
    Kept,
    /// So many others, which are not there in a rehearsal.
    Replaced { count: usize, combined: Option<Combined> },
}

impl Whole {
    /// Whether there are none in the place of the adapter's.
    fn is_nothing(&self) -> bool {
        matches!(self, Self::Replaced { count: 0, .. })
    }
}

/// Computes all modules, and writes them.
///
/// # Errors
/// Those of the computation and of writing.
pub(crate) fn run(
    mut job: Job<'_>,
    compute: &mut dyn Compute,
    place: Output<'_>,
    task: &Task,
) -> Result<Report> {
    let writing: &Writing = place.writing();
    let dtype = match writing.dtype()? {
        Some(dtype) => dtype,
        None => rounding::widest(job.adapters),
    };
    let pool = build_pool(writing.threads)?;
    let sums = &job.sums.modules;
    task.expect(compute.passes() * sums.iter().map(Sum::bytes).sum::<u64>());
    let results = if writing.dry_run { None } else { Some(Results::new(place.directory()?)?) };
    let budget = pool.install(|| compute.prepare(&dtype, task))?;
    let compute = &*compute;
    let compute_all = || {
        each(sums, &|sum| compute.elements(sum), |index| {
            task.check()?;
            let done = compute.module(index, &sums[index], &dtype, results.as_ref(), task);
            task.advance(sums[index].bytes());
            done
        })
    };
    // A file's digest is found by one thread, beside which the others compute.
    let describe = || if writing.dry_run { Ok(Vec::new()) } else { described(job.adapters) };
    let (done, inputs) = pool.install(|| rayon::join(compute_all, describe));
    let (done, inputs): (Vec<Done>, _) = (done?, inputs?);
    let mut records = IndexMap::new();
    let mut made = Vec::new();
    let mut bytes = 0;
    let mut done: Vec<Option<Done>> = done.into_iter().map(Some).collect();
    for places in stacks::parameters(sums) {
        let count = places.len();
        let mut own = Vec::with_capacity(count);
        for place in &places {
            let (record, one) = done[*place].take().expect("each is in one parameter");
            own.push((sums[*place].expert, record));
            made.extend(one);
        }
        let record = stacks::record(own);
        bytes += ((record.shape[0] + record.shape[1]) * record.rank * count * dtype.size()) as u64;
        records.insert(sums[places[0]].name(), record);
    }
    let vectors = compute.vectors(&dtype, task)?;
    let left_out = records.values().filter(|record| record.rank == 0).count();
    let has_parameters = match &job.whole {
        Whole::Kept => job.adapters.iter().any(|adapter| !adapter.saved().is_empty()),
        Whole::Replaced { .. } => !job.whole.is_nothing(),
    };
    let is_something = !vectors.is_empty() || (records.is_empty() && has_parameters);
    if left_out == records.len() && !is_something {
        return Err(Error::Argument(
            "nothing would be left: every module's update is zero".to_owned(),
        ));
    }
    if left_out > 0 {
        let first = records.iter().find(|(_, record)| record.rank == 0).expect("there is one");
        job.notes
            .push(format!("{left_out} modules are left out, with rank 0 (the first: {})", first.0));
    }
    let mut report = Report {
        target_format: writing.target()?.to_owned(),
        dtype: dtype.torch_name().unwrap_or(dtype.name()).to_owned(),
        error: overall(records.values()),
        modules: records,
        budget,
        lost: Vec::new(),
        notes: std::mem::take(&mut job.notes),
        bytes,
        files: Vec::new(),
    };
    if let Some(results) = results {
        let mut modules = results.modules(made)?;
        for module in &job.sums.kept {
            modules.insert(module.key.clone(), (*module).clone());
        }
        modules.extend(vectors.into_iter().map(|module| (module.key.clone(), module)));
        pool.install(|| place.write(&job, modules, inputs, task, &mut report))?;
    }
    Ok(report)
}

/// What is computed of all modules: of as many at once as there are threads, or as may be in memory.
///
/// # Errors
/// The first of the function's.
pub(crate) fn each<R: Send>(
    sums: &[Sum<'_>],
    elements_of: &dyn Fn(&Sum<'_>) -> usize,
    function: impl Fn(usize) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    let mut elements = 0;
    for (index, sum) in sums.iter().enumerate() {
        let own = elements_of(sum);
        match groups.last_mut() {
            Some(last) if elements + own <= DENSE_ELEMENTS => {
                last.end = index + 1;
                elements += own;
            }
            _ => {
                groups.push(index..index + 1);
                elements = own;
            }
        }
    }
    let mut all = Vec::with_capacity(sums.len());
    for group in groups {
        let found: Result<Vec<R>> = group.into_par_iter().map(&function).collect();
        all.extend(found?);
    }
    Ok(all)
}
