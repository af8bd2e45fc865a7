//! The delta that the parts of one module make, algorithm by algorithm.

use std::sync::Arc;

use super::modules::{ModuleParts, number};
use super::{GLora, Hadamard, Kronecker, Part};
use crate::adapter::deltas::{
    self, Generalized, HadamardSide, KroneckerSide, LowRank, Orthogonal, Scaled, Tucker,
};
use crate::adapter::{Delta, LayerKind, foreign};
use crate::error::{Error, Result};
use crate::limits;
use crate::tensor::safetensors::Tensor;

/// A delta, and what its module needs to know beside it.
pub(super) struct Made {
    pub delta: Arc<dyn Delta>,
    /// The rank as trainers call it.
    pub rank: u64,
    pub kind: LayerKind,
    pub has_scale: HasScale,
}

/// Whether a scale belongs to a delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HasScale {
    Always,
    /// Only where [`ScaleRule::scales_whole_factors`] says so.
    InPeft,
    Never,
}

impl Made {
    pub(super) fn of(delta: Arc<dyn Delta>, rank: u64) -> Self {
        let is_convolution = delta.input_shape().len() > 1;
        let kind = if is_convolution { LayerKind::Convolution } else { LayerKind::Linear };
        Self { delta, rank, kind, has_scale: HasScale::Always }
    }
}

impl ModuleParts {
    /// A product of two matrices, with a core between them or without.
    pub(super) fn low_rank(&mut self) -> Result<Made> {
        if self.get(Part::Down).is_none() && self.get(Part::Up).is_none() {
            return self.need(Part::Down, "factors").map(|_| unreachable!("it is not there"));
        }
        let (a, b) = match (self.take(Part::Down), self.take(Part::Up)) {
            (Some(a), Some(b)) => (a, b),
            (Some(a), None) => return Err(lacks(&a, "lora_up")),
            (_, Some(b)) => return Err(lacks(&b, "lora_down")),
            (None, None) => unreachable!("one of them is there"),
        };
        let file = a.file().path().to_path_buf();
        let broken = |message: String| Error::adapter(&file, message);
        if let Some(found) = foreign::experts(&a, &b, None) {
            return Err(Error::unsupported(&file, found));
        }
        let ones = |extents: &[u64]| extents.iter().all(|extent| *extent == 1);
        if let Some(mid) = self.take(Part::Mid) {
            let fits = mid.shape.len() >= 2
                && a.shape.len() >= 2
                && b.shape.len() >= 2
                && (b.shape[1], mid.shape[1]) == (mid.shape[0], a.shape[0])
                && ones(&a.shape[2..])
                && ones(&b.shape[2..])
                && [&a, &mid, &b].iter().all(|tensor| tensor.elements() > 0);
            if !fits {
                return Err(broken(format!(
                    "{} of shape {:?}, {} of shape {:?} and {} of shape {:?} are no factors with a core \
                     between them",
                    a.name, a.shape, mid.name, mid.shape, b.name, b.shape
                )));
            }
            let rank = a.shape[0];
            check_rank(&a, rank).map_err(broken)?;
            check_rank(&mid, mid.shape[0]).map_err(broken)?;
            let delta: Arc<dyn Delta> = Arc::new(Tucker { down: a, mid, up: b });
            return Ok(Made::of(delta, rank));
        }
        let is_pair = a.shape.len() >= 2
            && a.shape.len() == b.shape.len()
            && a.shape[0] == b.shape[1]
            && ones(&b.shape[2..]);
        if !is_pair {
            return Err(broken(format!(
                "{} of shape {:?} and {} of shape {:?} are no pair of factors",
                a.name, a.shape, b.name, b.shape
            )));
        }
        let rank = a.shape[0];
        check_rank(&a, rank).map_err(broken)?;
        let kind = if a.shape.len() == 2 { LayerKind::Linear } else { LayerKind::Convolution };
        let delta = Arc::new(LowRank { a, b, diagonal: None });
        Ok(Made { delta, rank, kind, has_scale: HasScale::Always })
    }

    /// LoHa.
    pub(super) fn hadamard(&mut self) -> Result<Made> {
        use Hadamard::{T1, T2, W1A, W1B, W2A, W2B};
        let mut side = |a, b, core| -> Result<_> {
            let a = self.need(
                Part::Hadamard(a),
                "other factors (hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b)",
            )?;
            let b = self.need(
                Part::Hadamard(b),
                "other factors (hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b)",
            )?;
            Ok(HadamardSide { a, b, core: self.take(Part::Hadamard(core)) })
        };
        let (first, second) = (side(W1A, W1B, T1)?, side(W2A, W2B, T2)?);
        let file = first.a.file().path().to_path_buf();
        let broken = |message: String| Error::adapter(&file, message);
        let extents = [&first, &second].map(hadamard_extents);
        let [Some((outputs, input_shape)), Some((others, other_shape))] = extents else {
            return Err(broken(no_factors(&hadamard_tensors(&first, &second), "a LoHa")));
        };
        let inputs = |shape: &[u64]| shape.iter().product::<u64>();
        let same = (outputs, inputs(&input_shape)) == (others, inputs(&other_shape))
            && outputs * inputs(&input_shape) > 0;
        if !same || first.core.is_some() != second.core.is_some() {
            return Err(broken(no_factors(&hadamard_tensors(&first, &second), "a LoHa")));
        }
        let rank = first.b.shape[0];
        check_rank(&first.b, rank).map_err(broken)?;
        check_rank(&second.b, second.b.shape[0]).map_err(broken)?;
        Ok(Made::of(Arc::new(deltas::Hadamard { first, second, outputs, input_shape }), rank))
    }

    /// LoKr.
    pub(super) fn kronecker(&mut self) -> Result<Made> {
        use Kronecker::{T2, W1, W1A, W1B, W2, W2A, W2B};
        let mut side = |[whole, a, b]: [Kronecker; 3], core: Option<Kronecker>| -> Result<_> {
            let words = if whole == W1 { "lokr_w1" } else { "lokr_w2" };
            let core = core.and_then(|core| self.take(Part::Kronecker(core)));
            let parts = [whole, a, b].map(|part| self.take(Part::Kronecker(part)));
            match (parts, core) {
                ([Some(whole), None, None], None) => Ok(KroneckerSide::Whole(whole)),
                ([None, Some(a), Some(b)], None) => Ok(KroneckerSide::Product(a, b)),
                ([None, Some(a), Some(b)], Some(core)) => Ok(KroneckerSide::Tucker(core, a, b)),
                ([None, None, None], None) => self
                    .need(Part::Kronecker(whole), words)
                    .map(|_| unreachable!("it is not there")),
                (parts, core) => {
                    let found: Vec<_> = parts.iter().flatten().chain(&core).collect();
                    Err(Error::adapter(
                        found[0].file().path(),
                        format!(
                            "has {} of {words}, which is either whole or two factors",
                            found
                                .iter()
                                .map(|one| one.name.as_str())
                                .collect::<Vec<_>>()
                                .join(", ")
                        ),
                    ))
                }
            }
        };
        let first = side([W1, W1A, W1B], None)?;
        let second = side([W2, W2A, W2B], Some(T2))?;
        let tensors = || -> Vec<Tensor> {
            let of_side =
                |side: &KroneckerSide| side.tensors().into_iter().cloned().collect::<Vec<_>>();
            [of_side(&first), of_side(&second)].concat()
        };
        let broken = |message: String| Error::adapter(tensors()[0].file().path(), message);
        let (Some(kernel_of_first), Some(kernel)) = (kernel_of(&first), kernel_of(&second)) else {
            return Err(broken(no_factors(&tensors(), "a LoKr")));
        };
        if kernel_of_first.iter().any(|extent| *extent != 1) {
            return Err(broken(no_factors(&tensors(), "a LoKr")));
        }
        let (width, other) = (first.extents().1, second.extents().1);
        let input_shape = if kernel.is_empty() {
            vec![width * other]
        } else {
            let channels = other / kernel.iter().product::<u64>().max(1);
            [&[width * channels], &*kernel].concat()
        };
        let stored = |side: &KroneckerSide| match side {
            KroneckerSide::Whole(_) => None,
            KroneckerSide::Product(_, b) | KroneckerSide::Tucker(_, _, b) => Some(b.shape[0]),
        };
        let rank = stored(&second).or_else(|| stored(&first));
        let delta = deltas::Kronecker { first: first.clone(), second: second.clone(), input_shape };
        if delta.rank() == 0 || delta.rank() > limits::RANK {
            return Err(broken(no_factors(&tensors(), "a LoKr")));
        }
        let has_scale = if rank.is_none() { HasScale::InPeft } else { HasScale::Always };
        let rank = rank.unwrap_or_else(|| delta.rank());
        Ok(Made { has_scale, ..Made::of(Arc::new(delta), rank) })
    }

    /// GLoRA.
    pub(super) fn generalized(&mut self) -> Result<Made> {
        use GLora::{A1, A2, B1, B2, BM};
        let words = "other factors (a1, a2, b1, b2)";
        let core = self.take(Part::GLora(BM));
        let mut need = |part| self.need(Part::GLora(part), words);
        let (a1, a2, b1, b2) = (need(A1)?, need(A2)?, need(B1)?, need(B2)?);
        let all = [a1, a2, b1, b2];
        let file = all[0].file().path().to_path_buf();
        let broken = |message: String| Error::adapter(&file, message);
        let ones = |extents: &[u64]| extents.iter().all(|extent| *extent == 1);
        // Early files have each pair the other way round; the rank is the smaller extent.
        let is_pair = |left: &Tensor, right: &Tensor| {
            left.shape.len() >= 2
                && right.shape.len() >= 2
                && left.shape[1] == right.shape[0]
                && ones(&left.shape[2..])
                && left.shape[1] <= left.shape[0].max(right.shape[1])
        };
        let [a1, a2, b1, b2] = &all;
        let is_modern = is_pair(a1, a2) && is_pair(b1, b2) && a1.shape[1] <= a1.shape[0];
        let is_early = is_pair(a2, a1) && is_pair(b2, b1);
        let (of_weight, added) = match (is_modern, is_early) {
            (true, _) => ([a1.clone(), a2.clone()], [b1.clone(), b2.clone()]),
            (false, true) => ([a2.clone(), a1.clone()], [b2.clone(), b1.clone()]),
            (false, false) => return Err(broken(no_factors(&all, "a GLoRA"))),
        };
        let inputs = [of_weight[0].shape[0], of_weight[1].shape[1], added[1].shape[1]];
        let is_empty = all.iter().any(|tensor| tensor.elements() == 0);
        if inputs != [inputs[0]; 3] || !ones(&of_weight[1].shape[2..]) || is_empty {
            return Err(broken(no_factors(&all, "a GLoRA")));
        }
        if let Some(core) = &core {
            let fits = matches!(*core.shape.as_slice(), [left, right, ..]
                if (left, right) == (added[0].shape[1], added[1].shape[0]))
                && ones(&added[1].shape[2..])
                && core.elements() > 0;
            if !fits {
                let all: Vec<_> = all.iter().chain([core]).cloned().collect();
                return Err(broken(no_factors(&all, "a GLoRA")));
            }
        }
        let rank = added[1].shape[0];
        check_rank(&added[1], rank).map_err(broken)?;
        Ok(Made::of(Arc::new(Generalized { of_weight, added, core }), rank))
    }

    /// LyCORIS's IA³.
    pub(super) fn scaled(&mut self) -> Result<Made> {
        if let Some(weight) = self.get(Part::Weight)
            && self.get(Part::OnInput).is_none()
        {
            let problem =
                format!("holds {}, which is no part of an update that is known", weight.name);
            return Err(Error::unsupported(weight.file().path(), problem));
        }
        if let Some(vector) = self.get(Part::Ia3) {
            let problem = format!(
                "holds {}, a part of an IA3 adapter of PEFT's, of which its config tells whether inputs \
                 or outputs are scaled",
                vector.name
            );
            return Err(Error::unsupported(vector.file().path(), problem));
        }
        let vector = self.need(Part::Weight, "weight")?;
        let flag = self.need(Part::OnInput, "on_input")?;
        check_vector(&vector).map_err(|message| Error::adapter(vector.file().path(), message))?;
        let on_input = number(&flag)? != 0.0;
        let scaled =
            Scaled { vector, on_input, less_one: true, with_bias: false, flag: Some(flag) };
        Ok(Made { has_scale: HasScale::Never, ..Made::of(Arc::new(scaled), 1) })
    }

    /// Diag-OFT or BOFT.
    pub(super) fn orthogonal(&mut self) -> Result<Made> {
        for part in [Part::OrthogonalElements, Part::EmbeddingElements] {
            if let Some(elements) = self.get(part) {
                let message = format!(
                    "holds {}, a part of an OFT as PEFT and OneTrainer write it, of which PEFT's config \
                     tells how rotations are made of it",
                    elements.name
                );
                return Err(Error::unsupported(elements.file().path(), message));
            }
        }
        let blocks = self.need(Part::OrthogonalBlocks, "oft_blocks")?;
        let (rescale, constraint) = (self.take(Part::Rescale), self.take(Part::Alpha));
        let broken = |message: String| Error::adapter(blocks.file().path(), message);
        let is_sound = match *blocks.shape.as_slice() {
            [count, rows, columns] => count > 0 && rows > 0 && rows == columns,
            [stages, count, rows, columns] => {
                // The butterflies have to come out even.
                let run = u32::try_from(stages.saturating_sub(1)).ok().and_then(|shift| {
                    1u64.checked_shl(shift).and_then(|runs| runs.checked_mul(rows))
                });
                let fits = run.is_some_and(|run| run > 0 && (count * rows).is_multiple_of(run));
                stages > 0 && count > 0 && rows == columns && rows.is_multiple_of(2) && fits
            }
            _ => false,
        };
        if !is_sound {
            let problem =
                format!("{} of shape {:?} is no set of square blocks", blocks.name, blocks.shape);
            return Err(broken(problem));
        }
        let rank = blocks.shape[blocks.shape.len() - 1];
        check_rank(&blocks, rank).map_err(broken)?;
        if let Some(constraint) = &constraint {
            number(constraint)?;
        }
        let orthogonal = Orthogonal { blocks: blocks.clone(), constraint, rescale };
        if let Some(rescale) = orthogonal.rescale.as_ref()
            && rescale.elements() != orthogonal.outputs()
        {
            return Err(broken(format!(
                "{} has shape {:?} but its module has {} outputs",
                rescale.name,
                rescale.shape,
                orthogonal.outputs()
            )));
        }
        Ok(Made { has_scale: HasScale::Never, ..Made::of(Arc::new(orthogonal), rank) })
    }
}

/// That a factor lacks another one.
pub(super) fn lacks(tensor: &Tensor, what: &str) -> Error {
    let problem = format!("has {} but not its {what}", tensor.name);
    Error::adapter(tensor.file().path(), problem)
}

/// That tensors' shapes do not make something, in words.
fn no_factors(tensors: &[Tensor], what: &str) -> String {
    let listed =
        tensors.iter().map(|tensor| format!("{} of shape {:?}", tensor.name, tensor.shape));
    format!("{} are no factors of {what}", listed.collect::<Vec<_>>().join(", "))
}

fn hadamard_tensors(first: &HadamardSide, second: &HadamardSide) -> Vec<Tensor> {
    let of_side = |side: &HadamardSide| {
        [&side.a, &side.b].into_iter().chain(&side.core).cloned().collect::<Vec<_>>()
    };
    [of_side(first), of_side(second)].concat()
}

/// The outputs and the input extents of one of LoHa's products, where its shapes fit together.
fn hadamard_extents(HadamardSide { a, b, core }: &HadamardSide) -> Option<(u64, Vec<u64>)> {
    let ones = |extents: &[u64]| extents.iter().all(|extent| *extent == 1);
    let &[rows, columns, ref rest @ ..] = a.shape.as_slice() else { return None };
    let &[rank, inputs, ref kernel @ ..] = b.shape.as_slice() else { return None };
    match core {
        None => (columns == rank && ones(rest)).then(|| (rows, b.shape[1..].to_vec())),
        Some(core) => {
            let &[left, right, ref extents @ ..] = core.shape.as_slice() else { return None };
            let fits = (left, right) == (rows, rank) && ones(rest) && ones(kernel);
            fits.then(|| (columns, [&[inputs], extents].concat()))
        }
    }
}

/// The extents of a kernel that one side of a Kronecker product has, where its shapes fit together.
fn kernel_of(side: &KroneckerSide) -> Option<Vec<u64>> {
    let ones = |extents: &[u64]| extents.iter().all(|extent| *extent == 1);
    let (kernel, fits) = match side {
        KroneckerSide::Whole(whole) => (whole.shape.get(2..)?, true),
        KroneckerSide::Product(a, b) => {
            let kernel = b.shape.get(2..)?;
            (kernel, ones(a.shape.get(2..)?) && a.shape[1] == b.shape[0])
        }
        KroneckerSide::Tucker(core, a, b) => {
            let kernel = core.shape.get(2..)?;
            let flat = ones(a.shape.get(2..)?) && ones(b.shape.get(2..)?);
            (kernel, flat && (core.shape[0], core.shape[1]) == (a.shape[0], b.shape[0]))
        }
    };
    let all = side.tensors().into_iter().all(|tensor| tensor.elements() > 0);
    (fits && all).then(|| kernel.to_vec())
}

/// Whether a tensor is one number for each of something.
fn check_vector(tensor: &Tensor) -> Result<(), String> {
    let wide = tensor.shape.iter().filter(|extent| **extent != 1).count();
    match wide <= 1 && tensor.elements() > 0 {
        true => Ok(()),
        false => Err(format!("{} has shape {:?}; it is a vector", tensor.name, tensor.shape)),
    }
}

/// Whether a rank is one that a module can have.
pub(super) fn check_rank(tensor: &Tensor, rank: u64) -> Result<(), String> {
    if rank == 0 || rank > limits::RANK {
        return Err(format!(
            "{} has rank {rank}; a rank is from 1 to {}",
            tensor.name,
            limits::RANK
        ));
    }
    Ok(())
}
