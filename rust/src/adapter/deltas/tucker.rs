//! The product of two stored matrices with the core of a convolution between them: Tucker's form of
//! LoCon.

use std::ops::Range;

use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::adapter::matrix::Matrix;
use crate::error::Result;
use crate::tensor::safetensors::Tensor;

/// up · (mid × down): ΔW[o, i, k…] = Σ up[o, m] · mid[m, n, k…] · down[n, i].
#[derive(Debug, Clone)]
pub struct Tucker {
    /// The first factor, (n, in, 1…).
    pub down: Tensor,
    /// The core, (m, n, k…).
    pub mid: Tensor,
    /// The second factor, (out, m, 1…).
    pub up: Tensor,
}

impl Delta for Tucker {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![
            ("the first factor", &self.down),
            ("the second factor", &self.up),
            ("the core between the factors", &self.mid),
        ]
    }

    fn outputs(&self) -> u64 {
        self.up.shape[0]
    }

    fn input_shape(&self) -> Vec<u64> {
        [&self.down.shape[1..2], &self.mid.shape[2..]].concat()
    }

    fn rank(&self) -> u64 {
        self.mid.shape[0]
    }

    fn form(&self) -> String {
        "Tucker".to_owned()
    }

    fn pair(&self, _expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        let a = Matrix::contract(&Matrix::read(&self.mid)?, &Matrix::read(&self.down)?);
        let pair = Matrix::pair(Matrix::read(&self.up)?, a);
        Ok(pair.rows(outputs))
    }

    fn is_low_rank(&self) -> bool {
        true
    }

    fn is_expanded(&self) -> bool {
        true
    }
}
