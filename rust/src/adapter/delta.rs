//! Deltas: what a module adds to a weight, as stored tensors that expand to a product B·A.
//!
//! A kind of delta is one file of `deltas/`. Nobody above this layer tells them apart: plans,
//! executors, measurements and similarities see the [`Pair`] that a delta expands to.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;

use super::deltas::{Generalized, Orthogonal, RescaledInputs, RotatedInputs, Scaled};
use super::factors::Pair;
use super::matrix::Matrix;
use crate::error::Result;
use crate::tensor::safetensors::Tensor;

/// What one module adds: tensors, and how they make the two factors of a product.
pub trait Delta: Debug + Send + Sync {
    /// Every tensor that it is made from, with the part that it plays, in words.
    fn tensors(&self) -> Vec<(&'static str, &Tensor)>;

    /// The number of outputs of the product.
    fn outputs(&self) -> u64;

    /// The outputs on which the product can be other than zero, in runs, ascending.
    fn changed_outputs(&self) -> Vec<Range<u64>> {
        std::iter::once(0..self.outputs()).collect()
    }

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

    /// The same with the first rows of B, as many as there are of so many, for whoever needs no more.
    ///
    /// # Errors
    /// As [`Delta::pair`].
    fn leading(&self, expert: Option<Expert>, rows: u64) -> Result<Pair> {
        self.pair(expert, Some(&(0..rows.min(self.outputs()))))
    }

    /// A and B, where the two stored tensors are these as they stand and nothing else is added.
    fn plain(&self) -> Option<(&Tensor, &Tensor)> {
        None
    }

    /// Whether one product of two whole matrices is added, however they are stored.
    fn is_low_rank(&self) -> bool {
        false
    }

    /// Whether the factors hold stored numbers, or products of two of them, without a rounding.
    fn is_exact(&self) -> bool {
        false
    }

    /// Whether it holds the products of several experts.
    fn holds_experts(&self) -> bool {
        false
    }

    /// Whether the rank of the product is another than what trainers call the rank.
    fn is_expanded(&self) -> bool {
        false
    }

    /// Whether its one input extent can be that of a convolution's inputs and kernel taken together.
    fn may_flatten_kernel(&self) -> bool {
        false
    }

    /// The two factors of each of two matrices whose Kronecker product is its product, where it is one.
    ///
    /// # Errors
    /// As [`Delta::pair`].
    fn kronecker(&self) -> Result<Option<[Pair; 2]>> {
        Ok(None)
    }

    /// What it makes of the whole weight, where that is more than a sum with its product.
    fn transform(&self) -> Option<&dyn Transform> {
        None
    }

    /// Whether there is a product, so that something can be said of the update without the base.
    fn has_product(&self) -> bool {
        true
    }

    /// DoRA's magnitudes of the inputs, where it has some.
    fn magnitude(&self) -> Option<&Tensor> {
        None
    }

    /// Whether the experts' products are those of layers, (outputs, inputs), whichever way a model
    /// stores its experts; else the adapter tells.
    fn is_of_layers(&self) -> bool {
        false
    }

    /// The two products whose rows lie in turn in its product, where it is made of them; one can be
    /// missing.
    fn rows_in_turn(&self) -> Option<[Option<Arc<dyn Delta>>; 2]> {
        None
    }

    /// Whether the outputs of an embedding's product are its tokens, so that the product is added to
    /// its weight as it is and not transposed.
    fn is_by_tokens(&self) -> bool {
        false
    }

    /// What trainers call it, as `peft_type` has it.
    fn algorithm(&self) -> &'static str {
        "LORA"
    }
}

/// What an adapter makes of a whole weight.
pub trait Transform {
    /// What it is, in a word for messages.
    fn name(&self) -> &'static str;

    /// Makes the new weight of the old one, (outputs, inputs) with a kernel among the inputs, or of a
    /// layer's bias, whose elements are rows. `outputs` says which rows these are, where the weight is
    /// stored in pieces: some for which [`Transform::is_of_rows`] holds.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if a file changed meanwhile or holds what cannot be computed with,
    /// [`crate::Error::Io`].
    fn apply(&self, weight: &mut Matrix, scaling: f64, outputs: Option<&Range<u64>>) -> Result<()>;

    /// Whether it makes these rows of themselves alone, so that a piece of a weight can be changed.
    fn is_of_rows(&self, outputs: &Range<u64>) -> bool;

    /// The formula and its tensors, for whoever computes it in a way of his own.
    fn formula(&self) -> Formula<'_>;

    /// Whether the layer's bias, where there is one, is changed in the same way.
    fn changes_bias(&self) -> bool {
        false
    }
}

/// The formulas of transforms, each with the tensors and settings that it is made from.
#[derive(Debug, Clone, Copy)]
pub enum Formula<'a> {
    /// GLoRA.
    Generalized(&'a Generalized),
    /// IA³.
    Scaled(&'a Scaled),
    /// LyCORIS's orthogonal blocks of outputs.
    Orthogonal(&'a Orthogonal),
    /// PEFT's orthogonal blocks of inputs.
    RotatedInputs(&'a RotatedInputs),
    /// DoRA of the inputs.
    RescaledInputs(&'a RescaledInputs),
}

/// One of the experts whose factors a module holds together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Expert {
    /// Which one.
    pub index: u64,
    /// Of how many.
    pub count: u64,
}
