//! The elementwise product of two products of matrices: LoHa (Hyeon-Woo et al. 2022,
//! arXiv:2108.06098).

use std::ops::Range;

use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::adapter::matrix::Matrix;
use crate::error::Result;
use crate::tensor::safetensors::Tensor;

/// (w1_a · w1_b) ∘ (w2_a · w2_b).
#[derive(Debug, Clone)]
pub struct Hadamard {
    /// The factors of the first product.
    pub first: HadamardSide,
    /// Those of the second.
    pub second: HadamardSide,
    /// The number of outputs.
    pub outputs: u64,
    /// The extents of the inputs: one alone where the stored factors do not tell a kernel.
    pub input_shape: Vec<u64>,
}

/// One of the two products.
#[derive(Debug, Clone)]
pub struct HadamardSide {
    /// (out, r); in Tucker's form (r, out).
    pub a: Tensor,
    /// (r, in·k); in Tucker's form (r, in).
    pub b: Tensor,
    /// The core of Tucker's form, (r, r, k…).
    pub core: Option<Tensor>,
}

impl HadamardSide {
    fn rank(&self) -> u64 {
        match &self.core {
            Some(core) => core.shape[0],
            None => self.b.shape[0],
        }
    }

    /// (outputs, r) and (r, inputs).
    fn factors(&self) -> Result<(Matrix, Matrix)> {
        let (a, b) = (Matrix::read(&self.a)?, Matrix::read(&self.b)?);
        Ok(match &self.core {
            Some(core) => (a.transposed(), Matrix::contract(&Matrix::read(core)?, &b)),
            None => (a, b),
        })
    }
}

impl Hadamard {
    fn inputs(&self) -> u64 {
        self.input_shape.iter().product()
    }

    /// The common extent of the expanded factors: one for each pair of the two ranks.
    fn pairs(&self) -> u64 {
        self.first.rank() * self.second.rank()
    }

    /// Whether ΔW itself is smaller than its factors.
    fn is_dense(&self) -> bool {
        self.pairs() >= self.outputs.min(self.inputs())
    }
}

impl Delta for Hadamard {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let Self { first, second, .. } = self;
        let cores = first.core.iter().chain(&second.core);
        let factors = [
            ("the right factor of the first product", &first.b),
            ("the left factor of the first product", &first.a),
            ("the right factor of the second product", &second.b),
            ("the left factor of the second product", &second.a),
        ];
        factors.into_iter().chain(cores.map(|core| ("the core of a product", core))).collect()
    }

    fn outputs(&self) -> u64 {
        self.outputs
    }

    fn input_shape(&self) -> Vec<u64> {
        self.input_shape.clone()
    }

    fn rank(&self) -> u64 {
        self.pairs().min(self.outputs).min(self.inputs())
    }

    fn form(&self) -> String {
        "Hadamard".to_owned()
    }

    /// The columns of B are the elementwise products of the columns of both left factors, the rows of
    /// A those of the rows of both right ones.
    fn pair(&self, _expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        let ((left, right), (other_left, other_right)) =
            (self.first.factors()?, self.second.factors()?);
        if self.is_dense() {
            let mut product = left.times(&right);
            let other = other_left.times(&other_right);
            product.values.iter_mut().zip(other.values).for_each(|(to, from)| *to *= from);
            return Ok(super::dense(product).rows(outputs));
        }
        let mut b = Matrix::zeros(left.rows, left.columns * other_left.columns);
        for row in 0..b.rows {
            let (left, other) = (left.row(row), other_left.row(row));
            let pairs = left.iter().flat_map(|x| other.iter().map(move |y| x * y));
            b.row_mut(row).iter_mut().zip(pairs).for_each(|(to, value)| *to = value);
        }
        let mut a = Matrix::zeros(right.rows * other_right.rows, right.columns);
        for row in 0..a.rows {
            let (right, other) =
                (right.row(row / other_right.rows), other_right.row(row % other_right.rows));
            let pairs = right.iter().zip(other).map(|(x, y)| x * y);
            a.row_mut(row).iter_mut().zip(pairs).for_each(|(to, value)| *to = value);
        }
        Ok(Matrix::pair(b, a).rows(outputs))
    }

    fn is_expanded(&self) -> bool {
        true
    }

    fn may_flatten_kernel(&self) -> bool {
        self.input_shape.len() == 1
    }

    fn algorithm(&self) -> &'static str {
        "LOHA"
    }

    fn is_exact(&self) -> bool {
        let is_stored = self.first.core.is_none() && self.second.core.is_none();
        is_stored
            && !self.is_dense()
            && self.tensors().iter().all(|(_, tensor)| tensor.dtype.size() <= 4)
    }
}
