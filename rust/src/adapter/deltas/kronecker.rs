//! The Kronecker product of two matrices, each stored whole or as a product: LoKr (Yeh et al. 2024,
//! arXiv:2309.14859).

use std::ops::Range;

use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::adapter::matrix::Matrix;
use crate::error::Result;
use crate::tensor::safetensors::Tensor;

/// w1 ⊗ w2.
#[derive(Debug, Clone)]
pub struct Kronecker {
    /// w1.
    pub first: KroneckerSide,
    /// w2.
    pub second: KroneckerSide,
    /// The extents of the inputs: one alone where the stored factors do not tell a kernel.
    pub input_shape: Vec<u64>,
}

/// One of the two factors.
#[derive(Debug, Clone)]
pub enum KroneckerSide {
    /// Stored whole, (rows, columns…).
    Whole(Tensor),
    /// (rows, r) and (r, columns…).
    Product(Tensor, Tensor),
    /// Tucker's form: the core (r, r, k…), (r, rows) and (r, columns).
    Tucker(Tensor, Tensor, Tensor),
}

impl KroneckerSide {
    /// The rows and the columns, a kernel included.
    pub fn extents(&self) -> (u64, u64) {
        let rest = |tensor: &Tensor| tensor.shape[1..].iter().product::<u64>();
        match self {
            Self::Whole(whole) => (whole.shape[0], rest(whole)),
            Self::Product(a, b) => (a.shape[0], rest(b)),
            Self::Tucker(core, a, b) => {
                (a.shape[1], b.shape[1] * core.shape[2..].iter().product::<u64>())
            }
        }
    }

    /// The extent that its two factors have in common.
    fn rank(&self) -> u64 {
        let (rows, columns) = self.extents();
        let stored = match self {
            Self::Whole(_) => rows.min(columns),
            Self::Product(_, b) => b.shape[0],
            Self::Tucker(core, ..) => core.shape[0],
        };
        stored.min(rows).min(columns)
    }

    /// What it is made from.
    pub fn tensors(&self) -> Vec<&Tensor> {
        match self {
            Self::Whole(whole) => vec![whole],
            Self::Product(a, b) => vec![a, b],
            Self::Tucker(core, a, b) => vec![core, a, b],
        }
    }

    /// Two matrices whose product it is: where it is no product of fewer, one of them is the identity.
    fn factors(&self) -> Result<(Matrix, Matrix)> {
        let (left, right) = match self {
            Self::Whole(whole) => {
                let whole = Matrix::read(whole)?;
                return Ok(super::dense_factors(whole));
            }
            Self::Product(a, b) => (Matrix::read(a)?, Matrix::read(b)?),
            Self::Tucker(core, a, b) => (
                Matrix::read(a)?.transposed(),
                Matrix::contract(&Matrix::read(core)?, &Matrix::read(b)?),
            ),
        };
        if right.rows as u64 > self.rank() {
            return Ok(super::dense_factors(left.times(&right)));
        }
        Ok((left, right))
    }
}

impl Delta for Kronecker {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let first = self.first.tensors().into_iter().map(|tensor| ("a part of w1", tensor));
        first
            .chain(self.second.tensors().into_iter().map(|tensor| ("a part of w2", tensor)))
            .collect()
    }

    fn outputs(&self) -> u64 {
        self.first.extents().0 * self.second.extents().0
    }

    fn input_shape(&self) -> Vec<u64> {
        self.input_shape.clone()
    }

    fn rank(&self) -> u64 {
        self.first.rank() * self.second.rank()
    }

    fn form(&self) -> String {
        "Kronecker".to_owned()
    }

    /// The Kronecker product of products is the product of Kronecker products: of both left factors,
    /// and of both right ones.
    fn pair(&self, _expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        let ((left, right), (other_left, other_right)) =
            (self.first.factors()?, self.second.factors()?);
        let pair = Matrix::pair(left.kronecker(&other_left), right.kronecker(&other_right));
        Ok(pair.rows(outputs))
    }

    fn kronecker(&self) -> Result<Option<[Pair; 2]>> {
        let pair = |side: &KroneckerSide| side.factors().map(|(b, a)| Matrix::pair(b, a));
        Ok(Some([pair(&self.first)?, pair(&self.second)?]))
    }

    fn is_expanded(&self) -> bool {
        true
    }

    fn may_flatten_kernel(&self) -> bool {
        self.input_shape.len() == 1
    }

    fn algorithm(&self) -> &'static str {
        "LOKR"
    }

    fn is_exact(&self) -> bool {
        let is_stored = |side: &KroneckerSide| match side {
            KroneckerSide::Whole(_) => true,
            KroneckerSide::Product(_, b) => b.shape[0] <= side.rank(),
            KroneckerSide::Tucker(..) => false,
        };
        is_stored(&self.first)
            && is_stored(&self.second)
            && self.tensors().iter().all(|(_, tensor)| tensor.dtype.size() <= 4)
    }
}
