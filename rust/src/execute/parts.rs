//! Shards that are written apart from each other, and the model that is assembled from them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::rounding::RoundingSums;
use super::session::{Session, WorkFilter};
use super::{Job, Options, Output, Summary, queue};
use crate::error::{Error, Owner, Result};
use crate::kernel::InstructionSet;
use crate::parallel::task::{self, Task};
use crate::plan::{Inputs, Plan, PlannedShard};
use crate::storage::digest::sha256_of;
use crate::storage::directory::LocalDirectory;
use crate::storage::local;
use crate::storage::sink::{OutputLock, Sink};
use crate::storage::source::{self, LocalFile, Source};

/// Tells the attempts of this process apart.
static ATTEMPTS: AtomicUsize = AtomicUsize::new(0);

/// A shard that was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WrittenShard {
    /// Its file name.
    pub name: String,
    /// Its bytes.
    pub bytes: u64,
    /// The SHA-256 of its content, in hexadecimal.
    pub sha256: String,
    /// What rounding took away from it.
    #[serde(default)]
    pub rounding: RoundingSums,
}

/// Writes some of a plan's shards into a directory, which is made if it is not there. Each has its
/// name once it is whole; what was there under that name is replaced.
///
/// # Errors
/// [`Error::Argument`] for shards that are no groups of the plan, [`Error::Numeric`],
/// [`Error::Io`], [`Error::Cancelled`].
pub fn write_shards(
    inputs: &Inputs,
    plan: &Plan,
    shards: &[usize],
    directory: &Path,
    options: &Options,
    task: &Task,
) -> Result<Vec<WrittenShard>> {
    let plan = plan.restricted_to(shards)?;
    let pool = task::build_pool(options.threads)?;
    local::create_directories(directory)?;
    local::allow_open(plan.shards.len() + inputs.base.shards().len());
    task.expect(plan.bytes());
    // Two attempts at a shard may be under way at once; each writes a file of its own, with the same bytes.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let attempt = ATTEMPTS.fetch_add(1, Ordering::Relaxed);
    let own = format!("{}.{now}.{attempt}", std::process::id());
    let partial = |name: &str| directory.join(format!("{name}.{own}.partial"));
    let _remains = Remains(plan.shards.iter().map(|shard| partial(&shard.name)).collect());
    let open = |shard: &PlannedShard| -> Result<Box<dyn Sink>> {
        let path = partial(&shard.name);
        let failed = |error| Error::io(&path, error);
        // A component's shards lie in its folder.
        path.parent().map_or(Ok(()), local::create_directories)?;
        let like = inputs.base.shards()[shard.source].file.source();
        let file = local::create_like(&path, like.as_file())?;
        file.set_len(shard.bytes()).map_err(failed)?;
        if !queue::copies_header(inputs, shard) {
            local::write_at(&file, &shard.header, 0).map_err(failed)?;
            task.advance(shard.header.len() as u64);
        }
        Ok(Box::new(file))
    };
    let files = plan.shards.iter().map(open).collect::<Result<Vec<_>>>()?;
    let output = Output { directory, files: &files, sync: options.sync, kept: &[] };
    let set = options.instruction_set.unwrap_or_else(InstructionSet::detect);
    let job = Job::without_digests(inputs, &plan, output, set, task, &WorkFilter::All);
    job.run(&pool)?;
    inputs.check_unchanged()?;
    let mut written = Vec::new();
    for (position, shard) in plan.shards.iter().enumerate() {
        task.check()?;
        let (from, to) = (partial(&shard.name), directory.join(&shard.name));
        let sha256 = sha256_of(&from)?;
        local::rename(&from, &to)?;
        written.push(WrittenShard {
            name: shard.name.clone(),
            bytes: shard.bytes(),
            sha256,
            rounding: job.rounding_of(position),
        });
    }
    Ok(written)
}

/// Files that are removed at the end where they are still there.
struct Remains(Vec<PathBuf>);

impl Drop for Remains {
    fn drop(&mut self) {
        self.0.iter().for_each(|path| local::remove(path));
    }
}

/// Makes a model of shards that were written apart: each has to be there, of the size that the plan
/// gives it and of the digest that its writer told. The output is still locked afterwards.
///
/// # Errors
/// [`Error::Output`] if a shard is not there or not what was written, and those of
/// [`super::execute`]; the output is then as it was.
pub fn assemble(
    inputs: &Inputs,
    plan: &Plan,
    (directory, written): (&Path, &[WrittenShard]),
    output: &Path,
    options: &Options,
    task: &Task,
) -> Result<(Summary, OutputLock)> {
    let pool = task::build_pool(options.threads)?;
    let look = |shard: &PlannedShard| {
        task.check()?;
        let path = directory.join(&shard.name);
        let told = written.iter().find(|one| one.name == shard.name);
        let stamp = LocalFile::open(&path)?.stamp();
        let fits =
            |told: &&WrittenShard| (told.bytes, stamp.length) == (shard.bytes(), shard.bytes());
        match told.filter(fits) {
            Some(told) if told.sha256 == sha256_of(&path)? => Ok((path, stamp)),
            _ => Err(Error::output(
                &path,
                "is not the shard that its part of the plan wrote; write that part again",
            )),
        }
    };
    let found: Vec<_> = pool.install(|| plan.shards.par_iter().map(look).collect::<Result<_>>())?;
    let mut rounding = RoundingSums::default();
    for shard in &plan.shards {
        let told = written.iter().find(|one| one.name == shard.name);
        rounding.add(&told.map_or_else(RoundingSums::default, |told| told.rounding));
    }
    let digests = inputs.adapters.iter().map(|adapter| adapter.sha256());
    let digests = digests.collect::<Result<Vec<_>>>()?;
    let output = LocalDirectory(output.to_path_buf());
    let session = Session::begin_with(inputs, plan, &output, options, task, &found)?;
    session.keep_digests(digests);
    session.add_rounding(&rounding);
    for (path, stamp) in &found {
        if !source::leads_to(path, *stamp).map_err(|error| Error::io(path, error))? {
            return Err(Owner::Checkpoint.changed(path));
        }
    }
    session.finish(inputs, plan, task)
}

#[cfg(test)]
mod tests;
