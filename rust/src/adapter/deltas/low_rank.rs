//! The product of two stored matrices, with a diagonal between them or without.

use std::ops::Range;

use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::error::Result;
use crate::kernel::convert::widen_f64;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

/// B·A, or B·diag(d)·A.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// The first factor, (r, in…).
    pub a: Tensor,
    /// The second factor, (out, r, 1…).
    pub b: Tensor,
    /// The diagonal between them, (r) (KaSA; Wang et al. 2024, arXiv:2412.06071).
    pub diagonal: Option<Tensor>,
}

impl Delta for LowRank {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let diagonal = self.diagonal.iter().map(|tensor| ("KaSA's diagonal", tensor));
        let factors = [("the first factor", &self.a), ("the second factor", &self.b)];
        factors.into_iter().chain(diagonal).collect()
    }

    fn outputs(&self) -> u64 {
        self.b.shape[0]
    }

    fn input_shape(&self) -> Vec<u64> {
        self.a.shape[1..].to_vec()
    }

    fn rank(&self) -> u64 {
        self.a.shape[0]
    }

    fn form(&self) -> String {
        "Plain".to_owned()
    }

    fn pair(&self, _expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        let mut pair = Pair::stored(&self.a, &self.b, outputs)?;
        if let Some(diagonal) = &self.diagonal {
            // The product of two numbers of 32 bits is exact in 64.
            let diagonal = diagonal.read_f64()?;
            let mut a = widen_f64(&pair.a_dtype, &pair.a);
            for (row, factor) in a.chunks_exact_mut(pair.inputs).zip(diagonal) {
                row.iter_mut().for_each(|value| *value *= factor);
            }
            pair.a = a.iter().flat_map(|value| value.to_le_bytes()).collect();
            pair.a_dtype = Dtype::F64;
        }
        Ok(pair)
    }

    fn plain(&self) -> Option<(&Tensor, &Tensor)> {
        self.diagonal.is_none().then_some((&self.a, &self.b))
    }

    fn is_low_rank(&self) -> bool {
        true
    }

    fn is_exact(&self) -> bool {
        // The product of two numbers of 32 bits is exact in 64.
        self.diagonal
            .as_ref()
            .is_none_or(|diagonal| diagonal.dtype.size().max(self.a.dtype.size()) <= 4)
    }
}
