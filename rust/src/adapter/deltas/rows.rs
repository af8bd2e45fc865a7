//! Some rows of what another delta adds: one of the modules of a fused layer whose factors are stored
//! as one.

use std::ops::Range;
use std::sync::Arc;

use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::error::Result;
use crate::tensor::safetensors::Tensor;

/// The outputs of a product that are one part of its layer's: all of A, and some rows of B.
#[derive(Debug, Clone)]
pub struct Rows {
    /// The product of the whole layer.
    pub whole: Arc<dyn Delta>,
    /// Which of its outputs.
    pub outputs: Range<u64>,
}

impl Delta for Rows {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        self.whole.tensors()
    }

    fn outputs(&self) -> u64 {
        self.outputs.end - self.outputs.start
    }

    fn input_shape(&self) -> Vec<u64> {
        self.whole.input_shape()
    }

    fn rank(&self) -> u64 {
        self.whole.rank()
    }

    fn form(&self) -> String {
        format!("Rows({}, {}..{})", self.whole.form(), self.outputs.start, self.outputs.end)
    }

    fn pair(&self, expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        let start = self.outputs.start;
        let rows = match outputs {
            Some(rows) => start + rows.start..start + rows.end,
            None => self.outputs.clone(),
        };
        self.whole.pair(expert, Some(&rows))
    }

    fn is_low_rank(&self) -> bool {
        self.whole.is_low_rank()
    }

    fn is_exact(&self) -> bool {
        self.whole.is_exact()
    }
}
