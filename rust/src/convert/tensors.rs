//! Tensors made of stored ones: rows of them, several below one another, a factor times a number.

use std::ops::Range;

use crate::adapter::factors::{common, of_values, times, values};
use crate::error::Result;
use crate::tensor::safetensors::{Tensor, TensorInfo};

/// Some rows of a tensor, which are read where they lie.
pub(super) fn rows(tensor: &Tensor, rows: &Range<u64>) -> Tensor {
    let row = tensor.bytes() / tensor.shape[0].max(1);
    let start = tensor.info().range.start;
    let mut shape = tensor.shape.clone();
    shape[0] = rows.end - rows.start;
    let range = start + rows.start * row..start + rows.end * row;
    Tensor::new(tensor.file().clone(), TensorInfo { shape, range, ..tensor.info().clone() })
}

/// Tensors of one width below one another.
///
/// # Errors
/// As [`values`].
pub(super) fn stacked(tensors: &[Tensor]) -> Result<Tensor> {
    let first = &tensors[0];
    let dtype = tensors.iter().fold(first.dtype.clone(), |all, one| common(&all, &one.dtype));
    let mut shape = first.shape.clone();
    shape[0] = tensors.iter().map(|tensor| tensor.shape[0]).sum();
    let mut all = Vec::new();
    for tensor in tensors {
        all.extend(values(tensor)?);
    }
    of_values(first, &dtype, shape, &all)
}

/// A block of B: at these rows, or nothing.
pub(super) struct Block<'a> {
    pub rows: u64,
    /// The factor on it, and B itself.
    pub factor: Option<(f64, &'a Tensor)>,
}

/// The block-diagonal matrix of several B, each times its number, with zeros where there is none.
///
/// # Errors
/// As [`values`].
pub(super) fn block_diagonal(blocks: &[Block<'_>]) -> Result<Tensor> {
    let present = || blocks.iter().filter_map(|block| block.factor);
    let rank_of = |tensor: &Tensor| tensor.shape[1..].iter().product::<u64>();
    let rank: u64 = present().map(|(_, tensor)| rank_of(tensor)).sum();
    let rows: u64 = blocks.iter().map(|block| block.rows).sum();
    let (_, like) = present().next().expect("a module has factors");
    let mut all = vec![0.0; (rows * rank) as usize];
    let (mut row, mut column) = (0, 0);
    let mut dtype = like.dtype.clone();
    for block in blocks {
        if let Some((factor, tensor)) = block.factor {
            let scaled = times(tensor, factor)?;
            dtype = common(&dtype, &scaled.dtype);
            let width = rank_of(tensor) as usize;
            for (index, line) in values(&scaled)?.chunks_exact(width).enumerate() {
                let start = (row + index) * rank as usize + column;
                all[start..start + width].copy_from_slice(line);
            }
            column += width;
        }
        row += block.rows as usize;
    }
    of_values(like, &dtype, vec![rows, rank], &all)
}

/// The transpose of a matrix.
///
/// # Errors
/// As [`values`].
pub(super) fn transposed(tensor: &Tensor) -> Result<Tensor> {
    let (rows, columns) = (tensor.shape[0] as usize, tensor.shape[1] as usize);
    let stored = values(tensor)?;
    let column = |column: usize| (0..rows).map(move |row| row * columns + column);
    let turned: Vec<f64> = (0..columns).flat_map(column).map(|place| stored[place]).collect();
    of_values(tensor, &tensor.dtype, vec![columns as u64, rows as u64], &turned)
}
