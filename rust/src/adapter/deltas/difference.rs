//! All that is added, stored as it stands: a matrix, or a vector.

use std::ops::Range;

use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::adapter::matrix::Matrix;
use crate::error::Result;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

/// A full difference, (out, in…) or (out).
#[derive(Debug, Clone)]
pub struct Difference {
    /// What is added.
    pub tensor: Tensor,
}

impl Delta for Difference {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("the difference", &self.tensor)]
    }

    fn outputs(&self) -> u64 {
        self.tensor.shape.first().copied().unwrap_or(1)
    }

    fn input_shape(&self) -> Vec<u64> {
        match self.tensor.shape.get(1..) {
            None | Some([]) => vec![1],
            Some(inputs) => inputs.to_vec(),
        }
    }

    fn rank(&self) -> u64 {
        self.outputs().min(self.input_shape().iter().product())
    }

    fn form(&self) -> String {
        "Difference".to_owned()
    }

    /// One of the factors is the identity of the smaller extent, the other is what is stored.
    fn pair(&self, _expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        let inputs = self.input_shape().iter().product::<u64>() as usize;
        if inputs == 1 {
            return Pair::vector(&self.tensor, outputs);
        }
        let dtype = self.tensor.dtype.clone();
        let height = self.outputs() as usize;
        if inputs <= height {
            let all = 0..self.outputs();
            let rows = outputs.unwrap_or(&all);
            return Ok(Pair {
                a: identity(inputs),
                a_dtype: Dtype::F32,
                b: self.tensor.read_rows(inputs as u64, rows)?,
                b_dtype: dtype,
                rank: inputs,
                outputs: (rows.end - rows.start) as usize,
                inputs,
            });
        }
        let pair = Pair {
            a: self.tensor.read()?,
            a_dtype: dtype,
            b: identity(height),
            b_dtype: Dtype::F32,
            rank: height,
            outputs: height,
            inputs,
        };
        Ok(pair.rows(outputs))
    }

    fn is_expanded(&self) -> bool {
        true
    }

    fn algorithm(&self) -> &'static str {
        "FULL"
    }

    fn is_exact(&self) -> bool {
        true
    }
}

/// Ones on the diagonal, in f32.
fn identity(extent: usize) -> Vec<u8> {
    let mut bytes = vec![0; extent * extent * size_of::<f32>()];
    for ones in bytes.chunks_exact_mut(size_of::<f32>()).step_by(extent + 1) {
        ones.copy_from_slice(&1f32.to_le_bytes());
    }
    bytes
}

/// Two factors of a matrix that is no product of smaller ones: it, and the identity of its smaller
/// extent.
pub(super) fn dense_factors(matrix: Matrix) -> (Matrix, Matrix) {
    if matrix.columns <= matrix.rows {
        let identity = Matrix::identity(matrix.columns);
        (matrix, identity)
    } else {
        (Matrix::identity(matrix.rows), matrix)
    }
}

/// The same as a pair.
pub(super) fn dense(matrix: Matrix) -> Pair {
    let (b, a) = dense_factors(matrix);
    Matrix::pair(b, a)
}
