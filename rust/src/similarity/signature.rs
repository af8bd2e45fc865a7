//! Invariants of one adapter's update under re-parameterization, for finding equivalent adapters.

use std::ops::ControlFlow;

use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::collection::Collection;
use super::load::{Factors, Reader};
use crate::adapter::alignment::MemberNames;
use crate::adapter::{Adapter, Module, zero};
use crate::error::Result;
use crate::measure::precision::Precision;
use crate::measure::spectrum::values_of;
use crate::parallel::task::Task;
use crate::storage::digest::sha256_of_bytes;
use crate::tensor::safetensors::Tensor;

/// Singular values that are kept of each module.
pub const LEADING: usize = 4;

/// How many times their own rounding two copies of 16-bit factors may be apart. That outweighs
/// whatever arithmetic made them, and is known to a percent for all but tiny factors.
const SLACK_OF_HALF: f64 = 2.0;
/// The same of factors of 32 and 64 bits, where the arithmetic counts as well: another
/// factorisation goes through an inverse, whose condition is that of a random matrix.
const SLACK: f64 = 64.0;

/// What does not depend on how an update is written down.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Signature {
    /// SHA-256 of the weights file.
    pub file: String,
    /// SHA-256 of every tensor's part, type, shape and bytes, whatever their order, what their
    /// modules are called, and the header around them.
    pub tensors: String,
    /// SHA-256 of the modules' scales, of how the factors began, and of the layers that are repeated.
    pub scales: String,
    /// Whether no factor and no scale is NaN or infinite.
    pub is_finite: bool,
    /// Whether a merge of it changes nothing.
    pub changes_nothing: bool,
    /// ‖ΔW‖.
    pub norm: f64,
    /// How far rounding may have moved ΔW, in the Frobenius norm: what copies may differ by.
    pub tolerance: f64,
    /// The sum of the modules' numerical ranks.
    pub rank: usize,
    /// The [`LEADING`] greatest singular values of each of the collection's modules; zero for
    /// those there are not.
    #[serde(skip)]
    pub leading: Vec<f64>,
}

/// Takes the signature of one member of a collection.
///
/// # Errors
/// [`crate::Error::Io`], and [`crate::Error::Adapter`] for a file that was changed meanwhile.
pub fn signature(collection: &Collection, member: usize) -> Result<Signature> {
    let member = &collection.members[member];
    let reader = Reader::new(member)?;
    let mut leading = vec![0.0; collection.modules.len() * LEADING];
    let (mut squares, mut errors, mut rank) = (0.0, 0.0, 0);
    let mut is_finite = true;
    for piece in &member.pieces {
        let module = &collection.modules[piece.module];
        let factors = reader.factors::<f64>(piece)?;
        errors += rounding(&factors, piece.rank, module.columns);
        let values = values_of(&factors.update(module.rows, module.columns, piece.rank)?);
        let first = values.first().copied().unwrap_or(0.0);
        is_finite &= first.is_finite();
        squares += values.iter().map(|value| value * value).sum::<f64>();
        rank += numerical_rank(&values);
        let place = &mut leading[piece.module * LEADING..][..LEADING];
        for (target, value) in place.iter_mut().zip(&values) {
            *target = *value;
        }
    }
    let adapter = member.open()?;
    let (file, tensors) = (adapter.sha256()?, digest_of_tensors(&adapter, &member.names)?);
    let changes_nothing = squares == 0.0 && zero::changes_nothing(&adapter)?;
    adapter.check_unchanged()?;
    Ok(Signature {
        file,
        tensors,
        scales: digest_of_scales(&adapter, &member.names),
        is_finite,
        changes_nothing,
        norm: squares.sqrt(),
        tolerance: errors.sqrt(),
        rank,
        leading,
    })
}

/// The signatures of some members, or why there is none, on the given threads. Progress is counted in
/// bytes.
///
/// # Errors
/// [`crate::Error::Cancelled`].
pub fn signatures(
    collection: &Collection,
    members: &[usize],
    pool: &rayon::ThreadPool,
    task: &Task,
) -> Result<Vec<Result<Signature>>> {
    let bytes = |member: &usize| collection.members[*member].bytes();
    task.expect(members.iter().map(bytes).sum());
    let signatures = pool.install(|| {
        members
            .par_iter()
            .map(|member| {
                task.check()?;
                let signature = signature(collection, *member);
                task.advance(bytes(member));
                signature
            })
            .collect()
    });
    task.check()?;
    Ok(signatures)
}

/// Values that count: those of a truncated update are nothing but rounding after the last.
pub(super) fn numerical_rank(values: &[f64]) -> usize {
    let first = values.first().copied().unwrap_or(0.0);
    values.iter().filter(|&&value| value > 1e-6 * first).count()
}

/// The square of what rounding may have done to s·B·A. With independent errors of variance ulp²/12
/// in every entry, E‖δB·A‖² = Σ_k Σ_i (ulp(b_ik)²/12)·‖a_k‖², and likewise for A; this depends on
/// the factors as the errors do.
fn rounding(factors: &Factors<f64>, rank: usize, columns: usize) -> f64 {
    let (b, a) = (Precision::of(&factors.b), Precision::of(&factors.a));
    let mut left = vec![(0.0, 0.0); rank];
    for row in factors.b.chunks_exact(rank) {
        for ((error, square), value) in left.iter_mut().zip(row) {
            *error += b.variance(*value);
            *square += value * value;
        }
    }
    let mut sum = 0.0;
    for ((b_error, b_square), row) in left.iter().zip(factors.a.chunks_exact(columns)) {
        let a_error: f64 = row.iter().map(|value| a.variance(*value)).sum();
        let a_square: f64 = row.iter().map(|value| value * value).sum();
        sum += b_error * a_square * slack(b).powi(2) + a_error * b_square * slack(a).powi(2);
    }
    sum * factors.scale * factors.scale
}

/// How many times its own rounding a copy may be apart.
fn slack(precision: Precision) -> f64 {
    match precision {
        Precision::Bf16 | Precision::F16 => SLACK_OF_HALF,
        Precision::F32 | Precision::F64 => SLACK,
    }
}

/// What the file says of each tensor but where it lies, in an order of its own.
fn digest_of_tensors(adapter: &Adapter, names: &MemberNames) -> Result<String> {
    let digest = |part: String, tensor: &Tensor| -> Result<Vec<u8>> {
        let mut hasher = Sha256::new();
        hasher.update(format!("{part}\n{} {:?}\n", tensor.dtype, tensor.shape));
        tensor.for_each_chunk(&mut |_, bytes| {
            hasher.update(bytes);
            ControlFlow::Continue(())
        })?;
        Ok(hasher.finalize().to_vec())
    };
    let mut digests = Vec::new();
    let mut known = std::collections::HashSet::new();
    for module in adapter.modules().values() {
        for (part, tensor) in module.tensors() {
            known.insert(tensor.name.as_str());
            let name = names.of_module(&module.key);
            digests.push(digest(format!("{name} {part}"), tensor)?);
        }
    }
    for tensor in &adapter.file().header().tensors {
        if !known.contains(tensor.name.as_str()) {
            let tensor = Tensor::new(adapter.file().clone(), tensor.clone());
            digests.push(digest(tensor.name.clone(), &tensor)?);
        }
    }
    digests.sort_unstable();
    Ok(sha256_of_bytes(&digests.concat()))
}

fn digest_of_scales(adapter: &Adapter, names: &MemberNames) -> String {
    let scale = |module: &Module| {
        format!("{} {:e} {}\n", names.of_module(&module.key), module.scaling, module.delta.form())
    };
    let mut scales: Vec<String> = adapter.modules().values().map(scale).collect();
    scales.sort_unstable();
    let semantics = adapter.semantics();
    scales.push(format!("{:?} {:?}", semantics.layer_replication, semantics.initialization));
    sha256_of_bytes(scales.concat().as_bytes())
}
