//! Sessions: one execution from the checked output to the finished directory, in steps, so that an executor
//! with arithmetic of its own can make some of the merged tensors while the CPU makes the rest.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use indexmap::IndexMap;
use rayon::prelude::*;

use super::compute::{self, Computer, Prepared};
use super::queue::{self, Work};
use super::recipes;
use super::rewrite;
use super::rounding::RoundingSums;
use super::{Job, Options, Output, Summary};
use crate::error::{Error, Owner, Result};
use crate::kernel::{InstructionSet, Recomputed};
use crate::parallel::task::{self, Task};
use crate::plan::{
    CARD, CARD_OF_BASE, FileOrigin, Inputs, Plan, PlannedShard, PlannedTensor, Precision, SideFiles,
};
use crate::storage::digest::sha256_of_source;
use crate::storage::local::{self, Stamp};
use crate::storage::sink::{
    Committed, Destination, Input, KeptFile, OutputLock, Request, Sink, StagedModel,
};
use crate::storage::source::{LocalFile, Source};
use crate::storage::store::Store;
use crate::tensor::dtype::Dtype;

/// A tensor of a plan: its shard's position and its own in that.
pub type TensorId = (usize, usize);

/// Which of a plan's units of work are carried out.
#[derive(Debug, Clone)]
pub enum WorkFilter {
    /// All of them.
    All,
    /// All but the merges of these tensors, which somebody else writes.
    Without(HashSet<TensorId>),
    /// The merges of these tensors alone.
    Only(HashSet<TensorId>),
}

impl WorkFilter {
    pub(super) fn takes(&self, work: &Work) -> bool {
        let id = match work {
            Work::Merge { shard, tensor, .. } => Some((*shard, *tensor)),
            _ => None,
        };
        match (self, id) {
            (Self::All, _) | (Self::Without(_), None) => true,
            (Self::Only(_), None) => false,
            (Self::Without(ids), Some(id)) => !ids.contains(&id),
            (Self::Only(ids), Some(id)) => ids.contains(&id),
        }
    }
}

/// Some values of a merged tensor before and after rounding, as bytes.
#[derive(Debug, Clone, Copy)]
pub struct RoundingSample<'a> {
    /// W₀'s, as [`Session::read_rows`] has them.
    pub before: &'a [u8],
    /// The exact results, or what is to be added to W₀, in f32.
    pub exact: &'a [u8],
    /// Whether the exact values are what is to be added.
    pub is_change: bool,
    /// What is written, in the output's type.
    pub written: &'a [u8],
}

/// A begun execution. Every step is given the inputs and the plan that it was begun with. Dropped
/// before [`Session::finish`], it leaves the output as it was found.
#[derive(Debug)]
pub struct Session {
    output: PathBuf,
    /// Before the staging, which removes them: fields are dropped in this order.
    files: Vec<Box<dyn Sink>>,
    staging: Box<dyn StagedModel>,
    /// Names and contents of what is written last, with the files that they are made from.
    last: Vec<(String, Vec<u8>, Box<dyn Source>)>,
    side_files: SideFiles,
    has_card: bool,
    total: u64,
    start: Instant,
    pool: rayon::ThreadPool,
    set: InstructionSet,
    sync: bool,
    digests: Mutex<Vec<String>>,
    rounding: Mutex<RoundingSums>,
    /// What exact sums had to compute again.
    recomputed: Mutex<Recomputed>,
    /// Those of the last tensors of which somebody else could not decide elements.
    prepared: Mutex<Vec<(TensorId, Arc<Prepared>)>>,
    /// Whether the shards' digests are asked for.
    has_digests: bool,
    /// That of the shards that are made here, and of those that were there.
    shard_rounding: Mutex<Vec<RoundingSums>>,
    /// The recipes of the shards, where they are asked for.
    recipes: Option<Vec<String>>,
    /// Shards that are there already.
    kept: Vec<bool>,
    /// Whether somebody else wrote rows that have to be synced.
    written: AtomicBool,
}

impl Session {
    /// Checks and locks the output, and writes the headers of all shards.
    ///
    /// # Errors
    /// [`Error::Output`] if the output may not be written, [`Error::Io`], [`Error::Argument`].
    pub fn begin(
        inputs: &Inputs,
        plan: &Plan,
        output: &dyn Destination,
        options: &Options,
        task: &Task,
    ) -> Result<Self> {
        Self::begin_with(inputs, plan, output, options, task, &[])
    }

    /// The same with shards that are written already: each one's file, and what was found there.
    /// Such a session is only to be finished.
    ///
    /// # Errors
    /// As [`Session::begin`].
    pub(super) fn begin_with(
        inputs: &Inputs,
        plan: &Plan,
        output: &dyn Destination,
        options: &Options,
        task: &Task,
        written: &[(PathBuf, Stamp)],
    ) -> Result<Self> {
        let start = Instant::now();
        let pool = task::build_pool(options.threads)?;
        let side_files = beside_card(&plan.side_files, options.card.is_some());
        let side_bytes: u64 = side_files.carried.iter().map(|file| file.stamp.length).sum();
        let total = plan.bytes() + side_bytes;
        let set = options.instruction_set.unwrap_or_else(InstructionSet::detect);
        let recipes = match &options.recipes {
            Some(_) if written.is_empty() => Some(recipes::of(inputs, plan, set, &pool)?),
            _ => None,
        };
        let known = match (&recipes, &options.recipes) {
            (Some(own), Some(earlier)) => recipes::known(plan, own, earlier),
            _ => vec![None; plan.shards.len()],
        };
        let known_shards = plan.shards.iter().zip(&known).filter(|(_, known)| known.is_some());
        let known_bytes: u64 = known_shards.map(|(shard, _)| shard.bytes()).sum();
        // The base's shards, the output's, each adapter's file, and what lies beside the weights.
        local::allow_open(2 * plan.shards.len() + inputs.adapters.len() + side_files.carried.len());
        let mut staging = output.begin(Request {
            overwrite: options.overwrite,
            sync: options.sync,
            // Files that are adopted take no room of their own.
            bytes: if options.adopts { side_bytes } else { total - known_bytes },
            names: names(inputs, plan, &side_files, options.card.is_some()),
            inputs: read_inputs(inputs, &side_files, &options.protected)?,
            stores: read_stores(inputs),
            job: if output.resumes() { job_id(inputs, plan)? } else { String::new() },
            stop: task.cancel_flag().clone(),
        })?;
        task.expect(total);
        // Before the weights: what cannot be read or written of them costs no work then. Config and
        // index, with which half-written weights would look like a model, wait in memory.
        let store = inputs.base.store();
        let mut configs = rewrite::config_contents(inputs, plan);
        let mut last = Vec::new();
        for file in &side_files.carried {
            task.check()?;
            let (from, name) = (file.store(inputs), file.source_name());
            let source = from.open(name)?;
            match configs.swap_remove(&file.name) {
                Some(content) if file.origin == FileOrigin::Base => {
                    last.push((file.name.clone(), content, source));
                }
                _ if source.stamp() != file.stamp => {
                    let owner = match file.origin {
                        FileOrigin::Base => Owner::Checkpoint,
                        FileOrigin::Adapter(_) => Owner::Adapter,
                    };
                    return Err(owner.changed(from.path(name)));
                }
                _ => staging.copy(&file.name, &*source, &from.path(name))?,
            }
            task.advance(file.stamp.length);
        }
        if let Some(card) = &options.card {
            staging.put(CARD, card.as_bytes(), None)?;
        }
        for (name, content) in rewrite::index_contents(&inputs.base, plan) {
            let source = store.open(&name)?;
            last.push((name, content, source));
        }
        for (shard, (path, stamp)) in plan.shards.iter().zip(written) {
            task.check()?;
            let source = LocalFile::open(path)?;
            if source.stamp() != *stamp {
                return Err(Owner::Checkpoint.changed(path));
            }
            if !(options.adopts && staging.adopt(&shard.name, &source, path)?) {
                staging.copy(&shard.name, &source, path)?;
            }
            task.advance(stamp.length);
        }
        let mut kept = vec![false; plan.shards.len()];
        let mut rounding = vec![RoundingSums::default(); plan.shards.len()];
        let groups = if known_bytes > 0 { plan.groups() } else { Vec::new() };
        for group in groups {
            let all = group.iter().map(|shard| known[*shard]).collect::<Option<Vec<_>>>();
            let Some(all) = all else { continue };
            let names = || group.iter().map(|shard| plan.shards[*shard].name.as_str());
            let marks: Vec<_> = names().zip(all.iter().map(|found| found.file)).collect();
            if staging.keep(&marks)? {
                for (shard, found) in group.iter().zip(all) {
                    kept[*shard] = true;
                    rounding[*shard] = found.rounding;
                    task.advance(plan.shards[*shard].bytes());
                }
            }
        }
        let files = plan.shards[written.len()..]
            .iter()
            .zip(&kept[written.len()..])
            .map(|(shard, is_kept)| {
                if *is_kept {
                    return Ok(Box::new(KeptFile) as Box<dyn Sink>);
                }
                let like = inputs.base.shards()[shard.source].file.source();
                let file = staging.create(&shard.name, shard.bytes(), Some(like))?;
                if !file.is_written() && !queue::copies_header(inputs, shard) {
                    let failed = |error| Error::io(output.root().join(&shard.name), error);
                    file.write_at(&shard.header, 0).map_err(failed)?;
                    task.advance(shard.header.len() as u64);
                }
                Ok(file)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            output: output.root().to_path_buf(),
            staging,
            last,
            files,
            side_files,
            has_card: options.card.is_some(),
            total,
            start,
            pool,
            set,
            sync: options.sync,
            digests: Mutex::new(Vec::new()),
            rounding: Mutex::default(),
            recomputed: Mutex::default(),
            prepared: Mutex::default(),
            has_digests: options.shard_digests,
            shard_rounding: Mutex::new(rounding),
            recipes,
            kept,
            written: AtomicBool::new(false),
        })
    }

    /// Bytes of the whole output.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Carries out a part of the plan on the CPU.
    ///
    /// # Errors
    /// [`Error::Numeric`], [`Error::Io`], [`Error::Cancelled`].
    pub fn run(
        &self,
        inputs: &Inputs,
        plan: &Plan,
        filter: &WorkFilter,
        task: &Task,
    ) -> Result<()> {
        let (directory, files, kept) = (&self.output, &self.files, &self.kept);
        let output = Output { directory, files, sync: self.sync, kept };
        let job = Job::new(inputs, plan, output, self.set, task, filter);
        job.run(&self.pool)?;
        let mut rounding = self.shard_rounding.lock().unwrap_or_else(PoisonError::into_inner);
        rounding.iter_mut().zip(job.rounding()).for_each(|(all, own)| all.add(&own));
        drop(rounding);
        self.recompute(job.recomputed());
        if !matches!(filter, WorkFilter::Only(_)) {
            *self.digests.lock().unwrap_or_else(PoisonError::into_inner) = job.digests()?;
        }
        Ok(())
    }

    /// Adds what rounding did to some values of a tensor that somebody else makes.
    ///
    /// # Panics
    /// If there are not as many of each.
    pub fn measure_rounding(&self, tensor: &PlannedTensor, sample: &RoundingSample<'_>) {
        let before = compute::widened(self.set, &tensor.source.dtype, sample.before);
        let exact = compute::widened(self.set, &Dtype::F32, sample.exact);
        let written = compute::widened(self.set, tensor.rounded_dtype(), sample.written);
        assert!(before.len() == exact.len() && written.len() == exact.len(), "as many of each");
        let mut sums = RoundingSums::default();
        if sample.is_change {
            sums.add_changes(&before, &exact, &written);
        } else {
            sums.add_results(&before, &exact, &written);
        }
        self.add_rounding(&sums);
    }

    /// Adds what exact sums had to compute again.
    pub fn recompute(&self, recomputed: Recomputed) {
        self.recomputed.lock().unwrap_or_else(PoisonError::into_inner).add(recomputed);
    }

    /// The SHA-256 of every shard, as it was written.
    fn shard_digests(&self, plan: &Plan, task: &Task) -> Result<IndexMap<String, String>> {
        let staged = self.staging.staged();
        let digest = |shard: &PlannedShard| {
            task.check()?;
            let digest = sha256_of_source(&*staged.open(&shard.name)?);
            let digest = digest.map_err(|error| Error::io(self.output.join(&shard.name), error))?;
            Ok((shard.name.clone(), digest))
        };
        let found =
            self.pool.install(|| plan.shards.par_iter().map(digest).collect::<Result<Vec<_>>>());
        Ok(found?.into_iter().collect())
    }

    pub(super) fn add_rounding(&self, sums: &RoundingSums) {
        self.rounding.lock().unwrap_or_else(PoisonError::into_inner).add(sums);
    }

    /// Notes the adapters' digests, where no run finds them.
    pub(super) fn keep_digests(&self, digests: Vec<String>) {
        *self.digests.lock().unwrap_or_else(PoisonError::into_inner) = digests;
    }

    /// Reads whole rows of a merged tensor's W₀, as they are stored (of a quantised one in f32).
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If the buffer is not as long as the rows.
    pub fn read_rows(
        &self,
        inputs: &Inputs,
        tensor: &PlannedTensor,
        rows: &Range<usize>,
        buffer: &mut [u8],
    ) -> Result<()> {
        let row = tensor.matrix().1 * tensor.source.dtype.size();
        assert_eq!(buffer.len(), rows.len() * row, "a buffer of whole rows");
        let computer = Computer { inputs, set: self.set, task: &Task::new() };
        computer.read(tensor, buffer, rows.start * row)
    }

    /// Writes whole rows of a merged tensor, in the output's type.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If the bytes are no whole rows within the tensor.
    pub fn write_rows(
        &self,
        plan: &Plan,
        (shard, tensor): TensorId,
        first_row: usize,
        bytes: &[u8],
    ) -> Result<()> {
        let planned = &plan.shards[shard];
        let tensor = &planned.tensors[tensor];
        let row = tensor.matrix().1 * tensor.output_dtype.size();
        let first = (first_row * row) as u64;
        let end = first + bytes.len() as u64;
        assert!(bytes.len().is_multiple_of(row), "whole rows");
        assert!(end <= tensor.target.end - tensor.target.start, "within the tensor");
        let offset = planned.header.len() as u64 + tensor.target.start + first;
        let failed = |error| Error::io(self.output.join(&planned.name), error);
        self.files[shard].write_at(bytes, offset).map_err(failed)?;
        if self.sync {
            self.files[shard].begin_writing(offset..offset + bytes.len() as u64);
            self.written.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Computes the elements of some rows of an exact sum that are not finite again: what somebody else
    /// could not decide. `stored` holds W₀'s rows, as [`Session::read_rows`] has them.
    ///
    /// # Errors
    /// [`Error::Numeric`] if a finite weight is infinite then, or NaN, [`Error::Io`].
    ///
    /// # Panics
    /// If the rows are not as many of each within one segment, or the tensor is no sum of products.
    pub fn decide(
        &self,
        inputs: &Inputs,
        plan: &Plan,
        id: TensorId,
        first_row: usize,
        (stored, target): (&[u8], &mut [u8]),
    ) -> Result<()> {
        let tensor = &plan.shards[id.0].tensors[id.1];
        let task = Task::new();
        let computer = Computer { inputs, set: self.set, task: &task };
        let prepared = self.prepared(&computer, tensor, id)?;
        let (from, to) = (&tensor.source.dtype, tensor.rounded_dtype());
        let rows = first_row..first_row + stored.len() / from.size() / prepared.columns().max(1);
        let mut recomputed = Recomputed::default();
        let finite =
            compute::decide(&prepared, &rows, (from, stored), (to, target), &mut recomputed);
        self.recompute(recomputed);
        if !finite {
            computer.find_overflow(tensor, target, first_row * prepared.columns())?;
        }
        Ok(())
    }

    /// What is prepared of a tensor of which tiles come one after the other.
    fn prepared(
        &self,
        computer: &Computer<'_>,
        tensor: &PlannedTensor,
        id: TensorId,
    ) -> Result<Arc<Prepared>> {
        /// Tiles of two tensors are on their way at a time.
        const KEPT: usize = 2;
        let mut kept = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, prepared)) = kept.iter().find(|(other, _)| *other == id) {
            return Ok(prepared.clone());
        }
        let prepared = Arc::new(computer.prepare(tensor)?);
        kept.truncate(KEPT - 1);
        kept.insert(0, (id, prepared.clone()));
        Ok(prepared)
    }

    /// The error for an element that was finite and is no more, by its index in the tensor.
    pub fn overflow(&self, inputs: &Inputs, tensor: &PlannedTensor, index: usize) -> Error {
        let computer = Computer { inputs, set: self.set, task: &Task::new() };
        compute::overflow(tensor, index, &computer.culprit(tensor))
    }

    /// Writes what makes the shards a model, where it is made: there it can be looked at before it is the
    /// output's.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Cancelled`].
    pub fn complete(&mut self, plan: &Plan, task: &Task) -> Result<()> {
        if self.written.swap(false, Ordering::Relaxed) {
            for (file, shard) in self.files.iter().zip(&plan.shards) {
                task.check()?;
                let failed = |error| Error::io(self.output.join(&shard.name), error);
                file.sync().map_err(failed)?;
            }
        }
        for (name, content, like) in std::mem::take(&mut self.last) {
            self.staging.put(&name, &content, Some(&*like))?;
        }
        Ok(())
    }

    /// The files that were written so far.
    pub fn staged(&self) -> Arc<dyn Store> {
        self.staging.staged()
    }

    /// Takes back what was written, so that no later merge goes on from it.
    pub fn discard(self) {
        drop(self.files);
        self.staging.discard();
    }

    /// Writes everything beside the weights and makes the output a model. Other merges stay out of it
    /// until the lock is released, so that a report is written beside the model that it is about.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Cancelled`]; the output is then as it was.
    pub fn finish(
        mut self,
        inputs: &Inputs,
        plan: &Plan,
        task: &Task,
    ) -> Result<(Summary, OutputLock)> {
        self.complete(plan, task)?;
        task.check()?;
        // What was written to meanwhile would make a model of two states.
        inputs.check_unchanged()?;
        let shard_sha256 = self.has_digests.then(|| self.shard_digests(plan, task)).transpose()?;
        let is_exact = plan.options.precision == Precision::Exact;
        let Committed { mut warnings, lock, marks } = self.staging.commit()?;
        let of_shards = self.shard_rounding.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut rounding = self.rounding.into_inner().unwrap_or_else(PoisonError::into_inner);
        of_shards.iter().for_each(|sums| rounding.add(sums));
        let rounding = rounding.loss();
        let mut recipes = self
            .recipes
            .as_ref()
            .map(|own| recipes::written(&self.output, &marks, plan, own, &of_shards));
        if let Some(recipes) = &mut recipes {
            // What rounding took away in those of an earlier call is not known any more.
            let resumed = plan.shards.iter().zip(&self.files).filter(|(_, file)| file.is_written());
            resumed.for_each(|(shard, _)| drop(recipes.shift_remove(&shard.name)));
        }
        let kept = plan.shards.iter().zip(&self.kept).filter(|(_, kept)| **kept);
        let kept = kept.map(|(shard, _)| shard.name.clone()).collect();
        warnings.extend(rounding.and_then(|loss| loss.warning()));
        let mut file_origins = self.side_files.origins();
        if self.has_card {
            file_origins.insert(CARD.to_owned(), "merge".to_owned());
            file_origins.sort_keys();
        }
        let summary = Summary {
            bytes_written: plan.bytes(),
            seconds: self.start.elapsed().as_secs_f64(),
            threads: self.pool.current_num_threads(),
            instruction_set: self.set,
            adapter_sha256: self.digests.into_inner().unwrap_or_else(PoisonError::into_inner),
            base_header_sha256: inputs
                .base
                .shards()
                .iter()
                .map(|shard| crate::storage::digest::sha256_of_bytes(shard.file.header_bytes()))
                .collect(),
            side_files: file_origins.keys().cloned().collect(),
            file_origins,
            rounding,
            recomputed: is_exact
                .then(|| self.recomputed.into_inner().unwrap_or_else(PoisonError::into_inner)),
            shard_sha256,
            left_out: self.side_files.left_out,
            recipes: recipes.unwrap_or_default(),
            kept,
            warnings,
        };
        Ok((summary, lock))
    }
}

/// The files beside the weights, those of the base under another name where the output has a card
/// of its own.
fn beside_card(planned: &SideFiles, has_card: bool) -> SideFiles {
    let mut files = planned.clone();
    if has_card && files.carried.iter().any(|file| file.name == CARD) {
        // The card of what the base was merged from describes neither.
        files.carried.retain(|file| file.name != CARD_OF_BASE);
        let card = files.carried.iter_mut().find(|file| file.name == CARD);
        if let Some(card) = card {
            card.source = Some(card.source_name().to_owned());
            card.name = CARD_OF_BASE.to_owned();
        }
    }
    files
}

/// Everything that the output will hold, but for its manifest.
fn names(inputs: &Inputs, plan: &Plan, side_files: &SideFiles, has_card: bool) -> Vec<String> {
    let shards = plan.shards.iter().map(|shard| shard.name.clone());
    let carried = side_files.carried.iter().map(|file| file.name.clone());
    let index = inputs.base.indexes().iter().map(|index| index.file_name.clone());
    let card = has_card.then(|| CARD.to_owned());
    shards.chain(carried).chain(index).chain(card).collect()
}

/// The stores other than directories that are read while the output is written.
fn read_stores(inputs: &Inputs) -> Vec<PathBuf> {
    let base = Some(inputs.base.store()).filter(|store| store.as_directory().is_none());
    let adapters = inputs.adapters.iter().filter(|adapter| !adapter.is_local());
    let base = base.map(|store| store.root().to_path_buf());
    base.into_iter().chain(adapters.map(|adapter| adapter.path().to_path_buf())).collect()
}

/// What tells this merge from all others: its plan, and what the base's files are.
fn job_id(inputs: &Inputs, plan: &Plan) -> Result<String> {
    let mut text = plan.digest(inputs)?;
    for shard in inputs.base.shards() {
        text.push_str(&format!(" {:?}", shard.file.stamp()));
    }
    Ok(crate::storage::digest::sha256_of_bytes(text.as_bytes()))
}

/// Everything that is read while the output is written, in which it must not be written.
fn read_inputs(
    inputs: &Inputs,
    side_files: &SideFiles,
    protected: &[PathBuf],
) -> Result<Vec<Input>> {
    let base = &inputs.base;
    let mut read = Vec::new();
    let mut add = |path: PathBuf, what: &str, is_base: bool| {
        read.push(Input { path, what: what.to_owned(), is_base });
    };
    if let Some(root) = base.store().as_directory() {
        add(root.to_path_buf(), "the base", base.is_directory());
        let shards = base.shards().iter().map(|shard| &shard.name);
        let of_base = side_files.carried.iter().filter(|file| file.origin == FileOrigin::Base);
        let beside: Vec<_> = of_base.map(|file| file.source_name().to_owned()).collect();
        let index = base.indexes().iter().map(|index| &index.file_name);
        for name in shards.chain(&beside).chain(index) {
            add(root.join(name), "the base", false);
        }
    }
    for adapter in inputs.adapters.iter().filter(|adapter| adapter.is_local()) {
        let what = format!("the adapter {}", adapter.path().display());
        for file in adapter.paths() {
            add(file.to_path_buf(), &what, false);
            let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
            add(folder.unwrap_or(Path::new(".")).to_path_buf(), &what, false);
        }
    }
    for model in protected {
        let is_directory = local::is_directory(model);
        let root = if is_directory { Some(model.as_path()) } else { model.parent() };
        let root = root.filter(|root| !root.as_os_str().is_empty()).unwrap_or(Path::new("."));
        add(root.to_path_buf(), "the merged model", is_directory);
        for path in local::paths_in(root)? {
            add(path, "the merged model", false);
        }
    }
    Ok(read)
}
