//! Two factors that lie otherwise in their tensors than as A and B: transposed, with their rows in
//! another order, or those of several experts one after the other.

use std::ops::Range;

use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::error::Result;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

/// The order in which the rows of B lie in its tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// As the outputs do.
    Straight,
    /// Of each of so many heads the two halves of the rotary embedding in turn, row by row (Meta's
    /// order); the outputs have the one half after the other (Hugging Face's).
    InterleavedHalves {
        /// The heads.
        heads: u64,
    },
}

impl RowOrder {
    /// The stored row of an output, of so many.
    pub fn stored_row(self, output: u64, outputs: u64) -> u64 {
        match self {
            Self::Straight => output,
            Self::InterleavedHalves { heads } => {
                let size = outputs / heads;
                let (head, within) = (output / size, output % size);
                let (half, place) = (within / (size / 2), within % (size / 2));
                head * size + place * 2 + half
            }
        }
    }
}

/// One of the two factors: a matrix in a tensor, or the matrices of several experts one after the
/// other.
#[derive(Debug, Clone)]
pub struct Factor {
    /// The tensor that holds it.
    pub tensor: Tensor,
    /// Rows and columns of one matrix as it is multiplied.
    pub extents: (u64, u64),
    /// Whether each matrix is stored transposed.
    pub is_transposed: bool,
    /// Whether the experts share one matrix.
    pub is_shared: bool,
}

impl Factor {
    /// The bytes of the matrix at that place, row-major.
    fn read(&self, place: u64) -> Result<Vec<u8>> {
        let (rows, columns) = self.extents;
        let place = if self.is_shared { 0 } else { place };
        let stored = self.tensor.read_rows(rows * columns, &(place..place + 1))?;
        Ok(match self.is_transposed {
            true => transposed(&stored, (columns as usize, rows as usize), &self.tensor.dtype),
            false => stored,
        })
    }

    /// The bytes of some rows of the matrix at that place, where these lie together.
    fn read_rows(&self, place: u64, rows: &Range<u64>) -> Result<Vec<u8>> {
        let (height, width) = self.extents;
        let first = if self.is_shared { 0 } else { place * height };
        self.tensor.read_rows(width, &(first + rows.start..first + rows.end))
    }

    fn form(&self) -> String {
        let transposed = if self.is_transposed { "T" } else { "" };
        let shared = if self.is_shared { "1" } else { "" };
        format!("{transposed}{shared}")
    }
}

/// B·A of factors that are stored in another arrangement.
#[derive(Debug, Clone)]
pub struct Arranged {
    /// The first factor, (r, in).
    pub a: Factor,
    /// The second factor, (out, r).
    pub b: Factor,
    /// How many experts' they are; none, where they are one pair.
    pub experts: Option<u64>,
    /// The order of B's rows.
    pub order: RowOrder,
    /// Whether the outputs of an embedding are its tokens, so that the product is its weight and not
    /// the transpose of it.
    pub is_by_tokens: bool,
}

impl Arranged {
    /// Of one pair of matrices.
    pub fn pair_of(a: Factor, b: Factor) -> Self {
        Self { a, b, experts: None, order: RowOrder::Straight, is_by_tokens: false }
    }

    /// A stored as (in, r) and B as (r, out), as MLX does.
    pub fn transposed(a: Tensor, b: Tensor) -> Self {
        let factor = |tensor: Tensor| Factor {
            extents: (tensor.shape[1], tensor.shape[0]),
            tensor,
            is_transposed: true,
            is_shared: false,
        };
        Self::pair_of(factor(a), factor(b))
    }

    fn product_rank(&self) -> u64 {
        self.a.extents.0
    }

    fn one(&self, place: u64, outputs: Option<&Range<u64>>) -> Result<Pair> {
        let (height, rank) = (self.b.extents.0, self.b.extents.1 as usize);
        let (a, a_dtype) = (self.a.read(place)?, self.a.tensor.dtype.clone());
        let inputs = self.a.extents.1 as usize;
        let b_dtype = self.b.tensor.dtype.clone();
        if let Some(rows) =
            outputs.filter(|_| !self.b.is_transposed && self.order == RowOrder::Straight)
        {
            let b = self.b.read_rows(place, rows)?;
            let outputs = (rows.end - rows.start) as usize;
            return Ok(Pair { a, a_dtype, b, b_dtype, rank, outputs, inputs });
        }
        let mut b = self.b.read(place)?;
        if self.order != RowOrder::Straight {
            let row = rank * b_dtype.size();
            b = (0..height)
                .flat_map(|output| {
                    let start = self.order.stored_row(output, height) as usize * row;
                    &b[start..start + row]
                })
                .copied()
                .collect();
        }
        let pair = Pair { a, a_dtype, b, b_dtype, rank, outputs: height as usize, inputs };
        Ok(match outputs {
            Some(rows) => pair.outputs(rows.start as usize..rows.end as usize),
            None => pair,
        })
    }
}

impl Delta for Arranged {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("the first factor", &self.a.tensor), ("the second factor", &self.b.tensor)]
    }

    fn outputs(&self) -> u64 {
        self.b.extents.0
    }

    fn input_shape(&self) -> Vec<u64> {
        vec![self.a.extents.1]
    }

    fn rank(&self) -> u64 {
        self.product_rank() * self.experts.unwrap_or(1)
    }

    fn form(&self) -> String {
        let order = match self.order {
            RowOrder::Straight => String::new(),
            RowOrder::InterleavedHalves { heads } => format!(", halves of {heads}"),
        };
        let experts = self.experts.map_or(String::new(), |count| format!(", experts {count}"));
        format!("Arranged({}, {}{experts}{order})", self.a.form(), self.b.form())
    }

    /// Without an expert, of several: their A below one another, their B side by side.
    fn pair(&self, expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        let count = self.experts.unwrap_or(1);
        if let Some(Expert { index, .. }) = expert {
            return self.one(index, outputs);
        }
        let mut whole = self.one(0, outputs)?;
        if count == 1 {
            return Ok(whole);
        }
        let mut all = vec![whole.b.clone()];
        for place in 1..count {
            let next = self.one(place, outputs)?;
            whole.a.extend(next.a);
            all.push(next.b);
        }
        let row = whole.rank * whole.b_dtype.size();
        whole.b = (0..whole.outputs)
            .flat_map(|output| all.iter().flat_map(move |b| &b[output * row..(output + 1) * row]))
            .copied()
            .collect();
        whole.rank *= count as usize;
        Ok(whole)
    }

    fn is_low_rank(&self) -> bool {
        self.experts.is_none()
    }

    fn holds_experts(&self) -> bool {
        self.experts.is_some()
    }

    fn is_of_layers(&self) -> bool {
        self.experts.is_some()
    }

    fn is_by_tokens(&self) -> bool {
        self.is_by_tokens
    }

    fn is_exact(&self) -> bool {
        true
    }
}

/// The transpose of a row-major matrix of those stored rows and columns.
pub(crate) fn transposed(stored: &[u8], (rows, columns): (usize, usize), dtype: &Dtype) -> Vec<u8> {
    let size = dtype.size();
    let mut turned = vec![0; stored.len()];
    for (row, line) in stored.chunks_exact((columns * size).max(1)).enumerate() {
        for (column, element) in line.chunks_exact(size).enumerate() {
            let to = (column * rows + row) * size;
            turned[to..to + size].copy_from_slice(element);
        }
    }
    turned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_that_are_interleaved_are_put_one_after_the_other() {
        let order = RowOrder::InterleavedHalves { heads: 2 };
        let rows: Vec<u64> = (0..12).map(|output| order.stored_row(output, 12)).collect();
        assert_eq!(rows, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
        assert_eq!(RowOrder::Straight.stored_row(7, 12), 7);
    }

    #[test]
    fn a_transpose_moves_whole_elements() {
        let stored = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        let turned = transposed(&stored, (2, 3), &Dtype::F16);
        assert_eq!(turned, [1, 2, 7, 8, 3, 4, 9, 10, 5, 6, 11, 12]);
    }
}
