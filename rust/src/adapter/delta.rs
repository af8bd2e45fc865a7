//! Deltas: what a module adds to a weight, as stored tensors that expand to a product B·A.
//!
//! A kind of delta is one file of `deltas/`. Nobody above this layer tells them apart: plans,
//! executors, measurements and similarities see the [`Pair`] that a delta expands to.

use std::fmt::Debug;
use std::ops::{ControlFlow, Range};

use serde::Serialize;

use super::factors::Pair;
use crate::error::Result;
use crate::tensor::safetensors::Tensor;

/// What one module adds: tensors, and how they make the two factors of a product.
pub trait Delta: Debug + Send + Sync {
    /// Every tensor that it is made from, with the part that it plays, in words.
    fn tensors(&self) -> Vec<(&'static str, &Tensor)>;

    /// The number of outputs of the product.
    fn outputs(&self) -> u64;

    /// The extents of the product's inputs: one, or those of a convolution's kernel as well.
    fn input_shape(&self) -> Vec<u64>;

    /// The common extent of all factors, those of several experts taken together.
    fn rank(&self) -> u64;

    /// How the tensors make the product, in a word that is part of digests.
    fn form(&self) -> String;

    /// The two factors, or one expert's, with the given rows of B only. They do not hold the scale.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if a file changed meanwhile, [`crate::Error::Io`].
    fn pair(&self, expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair>;

    /// A and B, where the two stored tensors are these as they stand and nothing else is added.
    fn plain(&self) -> Option<(&Tensor, &Tensor)> {
        None
    }

    /// Whether one product of two whole matrices is added, however they are stored.
    fn is_low_rank(&self) -> bool {
        false
    }

    /// Whether it holds the products of several experts.
    fn holds_experts(&self) -> bool {
        false
    }

    /// Whether the product is zero because a factor never moved from its start. Where that is not
    /// plain to see, it is not.
    ///
    /// # Errors
    /// As [`Delta::pair`].
    fn is_zero(&self) -> Result<bool> {
        Ok(false)
    }
}

/// One of the experts whose factors a module holds together, as PEFT's `target_parameters` do:
/// of A (count·r, in) the rows e·r to (e+1)·r, of B (out, r·count) the columns k·count + e.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Expert {
    /// Which one.
    pub index: u64,
    /// Of how many.
    pub count: u64,
}

/// Whether every element of a tensor is zero.
///
/// # Errors
/// [`crate::Error::Adapter`] if the file changed meanwhile, [`crate::Error::Io`].
pub(super) fn is_all_zero(tensor: &Tensor) -> Result<bool> {
    let size = tensor.dtype.size();
    // Zero but for the sign, which is the highest bit of the last byte.
    let is_zero = |element: &[u8]| {
        element[size - 1] & 0x7f == 0 && element[..size - 1].iter().all(|byte| *byte == 0)
    };
    // One of the first elements nearly always tells.
    let mut beginning = [0; 64];
    let beginning = &mut beginning[..tensor.bytes().min(64) as usize];
    tensor.read_into(0, beginning)?;
    let mut all_zero = beginning.chunks_exact(size).all(is_zero);
    if all_zero {
        tensor.for_each_chunk(&mut |_, bytes| {
            all_zero = bytes.chunks_exact(size).all(is_zero);
            if all_zero { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
    }
    Ok(all_zero)
}
