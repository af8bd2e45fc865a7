//! The two factors of a product in numbers: what every delta expands to.

use std::ops::Range;

pub use super::computed::times;
use crate::error::Result;
use crate::kernel::Operand;
use crate::kernel::convert::widen_f64;
use crate::tensor::dtype::Dtype;
use crate::tensor::orientation::Orientation;
use crate::tensor::safetensors::Tensor;

/// The A of a vector that is added: a vector is a product with one column.
const ONE: [u8; 4] = 1f32.to_le_bytes();

/// The two factors of one product B·A, row-major, little-endian.
#[derive(Debug, Clone)]
pub struct Pair {
    /// A, (rank, inputs).
    pub a: Vec<u8>,
    /// The element type of A.
    pub a_dtype: Dtype,
    /// B, (outputs, rank).
    pub b: Vec<u8>,
    /// The element type of B.
    pub b_dtype: Dtype,
    /// The common extent.
    pub rank: usize,
    /// Rows of B.
    pub outputs: usize,
    /// Columns of A.
    pub inputs: usize,
}

impl Pair {
    /// Two stored tensors as they stand: A (r, in…) and the given rows of B (out, r…).
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if a file changed meanwhile, [`crate::Error::Io`].
    pub fn stored(a: &Tensor, b: &Tensor, rows: Option<&Range<u64>>) -> Result<Self> {
        let all = 0..b.shape[0];
        let rows = rows.unwrap_or(&all);
        Ok(Self {
            b: b.read_rows(b.shape[1..].iter().product(), rows)?,
            b_dtype: b.dtype.clone(),
            a: a.read()?,
            a_dtype: a.dtype.clone(),
            rank: a.shape[0] as usize,
            outputs: (rows.end - rows.start) as usize,
            inputs: a.shape[1..].iter().product::<u64>() as usize,
        })
    }

    /// Some rows of a vector, as a product with one column.
    ///
    /// # Errors
    /// As [`Pair::stored`].
    pub fn vector(vector: &Tensor, rows: Option<&Range<u64>>) -> Result<Self> {
        let all = 0..vector.elements();
        let rows = rows.unwrap_or(&all);
        Ok(Self {
            a: ONE.to_vec(),
            a_dtype: Dtype::F32,
            b: vector.read_rows(1, rows)?,
            b_dtype: vector.dtype.clone(),
            rank: 1,
            outputs: (rows.end - rows.start) as usize,
            inputs: 1,
        })
    }

    /// The product's rows as they lie on a weight stored that way.
    pub fn stored_rows(self, orientation: Orientation, rows: Range<usize>) -> Self {
        match orientation {
            Orientation::OutIn => self.outputs(rows),
            Orientation::InOut => self.inputs(rows),
        }
    }

    /// As the kernels take it.
    pub fn operand(&self, coefficient: f64) -> Operand<'_> {
        Operand {
            a: &self.a,
            a_dtype: &self.a_dtype,
            b: &self.b,
            b_dtype: &self.b_dtype,
            rank: self.rank,
            coefficient,
        }
    }

    /// The same with these rows of B only.
    pub fn outputs(mut self, rows: Range<usize>) -> Self {
        if rows.len() < self.outputs {
            let row = self.rank * self.b_dtype.size();
            self.b.truncate(rows.end * row);
            self.b.drain(..rows.start * row);
            self.outputs = rows.len();
        }
        self
    }

    /// The same with these rows of B only, or with all of them.
    pub fn rows(self, outputs: Option<&Range<u64>>) -> Self {
        match outputs {
            Some(rows) => self.outputs(rows.start as usize..rows.end as usize),
            None => self,
        }
    }

    /// The same with these columns of A only.
    pub fn inputs(self, columns: Range<usize>) -> Self {
        if columns.len() == self.inputs {
            return self;
        }
        let size = self.a_dtype.size();
        let row = self.inputs * size;
        let cut = columns.start * size..columns.end * size;
        let a = self.a.chunks_exact(row).flat_map(|row| &row[cut.clone()]).copied().collect();
        Self { a, inputs: columns.len(), ..self }
    }
}

/// A type that holds all values of both.
pub fn common(one: &Dtype, other: &Dtype) -> Dtype {
    match (one, other) {
        (one, other) if one == other => one.clone(),
        (Dtype::F64, _) | (_, Dtype::F64) => Dtype::F64,
        _ => Dtype::F32,
    }
}

/// A tensor's values in f64.
///
/// # Errors
/// [`crate::Error::Adapter`] if the file changed meanwhile, [`crate::Error::Io`].
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(widen_f64(&tensor.dtype, &tensor.read()?))
}
