//! A product of two stored matrices whose rows, columns or first factor lie otherwise than the weight's.

use std::ops::Range;
use std::sync::Arc;

use super::arranged::transposed;
use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::error::Result;
use crate::storage::digest::sha256_of_bytes;
use crate::tensor::safetensors::Tensor;

/// Where each place of a weight lies in what is stored: at `order[place]`.
pub type Order = Arc<Vec<u64>>;

/// B·A with the rows of B, and the columns of A, brought into the weight's order.
#[derive(Debug, Clone)]
pub struct Reordered {
    /// The first factor: (r, in), or (in, r).
    pub a: Tensor,
    /// The second factor, (out, r).
    pub b: Tensor,
    /// Whether the first factor is stored transposed.
    pub a_is_transposed: bool,
    /// The order of the rows, where it is not the weight's.
    pub outputs: Option<Order>,
    /// The order of the columns, where it is not the weight's.
    pub inputs: Option<Order>,
}

impl Delta for Reordered {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("the first factor", &self.a), ("the second factor", &self.b)]
    }

    fn outputs(&self) -> u64 {
        self.b.shape[0]
    }

    fn input_shape(&self) -> Vec<u64> {
        vec![self.a.shape[usize::from(!self.a_is_transposed)]]
    }

    fn rank(&self) -> u64 {
        self.b.shape[1]
    }

    /// The orders are part of it: a base can tell them, so that one file has several.
    fn form(&self) -> String {
        let of = |order: &Option<Order>| {
            let bytes = order.iter().flat_map(|order| order.iter()).flat_map(|at| at.to_le_bytes());
            order.as_ref().map(|_| sha256_of_bytes(&bytes.collect::<Vec<u8>>()))
        };
        format!(
            "Reordered({}, {:?}, {:?})",
            self.a_is_transposed,
            of(&self.outputs),
            of(&self.inputs)
        )
    }

    fn pair(&self, _expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        let rank = self.rank();
        let all = 0..self.outputs();
        let wanted = outputs.unwrap_or(&all);
        let size = self.b.dtype.size() * rank as usize;
        let b = match &self.outputs {
            None => self.b.read_rows(rank, wanted)?,
            Some(order) => {
                let stored = &order[wanted.start as usize..wanted.end as usize];
                let first = stored.iter().copied().min().unwrap_or(0);
                let end = stored.iter().copied().max().map_or(0, |last| last + 1);
                let rows = self.b.read_rows(rank, &(first..end))?;
                gathered(&rows, size, stored.iter().map(|row| row - first))
            }
        };
        let mut a = self.a.read()?;
        let (a_size, inputs) = (self.a.dtype.size(), self.input_shape()[0] as usize);
        if self.a_is_transposed {
            a = transposed(&a, (inputs, rank as usize), &self.a.dtype);
        }
        if let Some(order) = &self.inputs {
            let rows = a.chunks_exact(inputs * a_size);
            a = rows.flat_map(|row| gathered(row, a_size, order.iter().copied())).collect();
        }
        Ok(Pair {
            a,
            a_dtype: self.a.dtype.clone(),
            b,
            b_dtype: self.b.dtype.clone(),
            rank: rank as usize,
            outputs: (wanted.end - wanted.start) as usize,
            inputs,
        })
    }

    fn is_low_rank(&self) -> bool {
        true
    }

    fn is_exact(&self) -> bool {
        true
    }
}

/// Pieces of that many bytes, those of these places.
fn gathered(bytes: &[u8], size: usize, places: impl Iterator<Item = u64>) -> Vec<u8> {
    let mut all = Vec::with_capacity(places.size_hint().0 * size);
    for place in places {
        all.extend_from_slice(&bytes[place as usize * size..(place as usize + 1) * size]);
    }
    all
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::kernel::convert::widen_f64;
    use crate::tensor::dtype::Dtype;

    fn tensor(shape: [u64; 2]) -> Tensor {
        let values = (0..shape[0] * shape[1]).map(|value| value as f32);
        let bytes = values.flat_map(f32::to_le_bytes).collect();
        Tensor::in_memory(Path::new("x"), "x", Dtype::F32, shape.to_vec(), bytes).expect("sound")
    }

    #[test]
    fn rows_and_columns_come_from_where_they_are_stored() {
        let delta = Reordered {
            a: tensor([3, 2]),
            b: tensor([4, 2]),
            a_is_transposed: true,
            outputs: Some(Arc::new(vec![2, 0, 3, 1])),
            inputs: Some(Arc::new(vec![1, 2, 0])),
        };
        let extents = (delta.outputs(), delta.input_shape(), delta.rank());
        assert_eq!(extents, (4, vec![3], 2));
        let of = |rows: Option<Range<u64>>| {
            let pair = delta.pair(None, rows.as_ref()).expect("read");
            assert_eq!(pair.b.len(), pair.outputs * pair.rank * 4);
            (widen_f64(&pair.a_dtype, &pair.a), widen_f64(&pair.b_dtype, &pair.b))
        };
        // Stored, A is [[0, 1], [2, 3], [4, 5]], a row for each column of the weight.
        let a = vec![2.0, 4.0, 0.0, 3.0, 5.0, 1.0];
        assert_eq!(of(None), (a.clone(), vec![4.0, 5.0, 0.0, 1.0, 6.0, 7.0, 2.0, 3.0]));
        assert_eq!(of(Some(1..3)), (a.clone(), vec![0.0, 1.0, 6.0, 7.0]));
        assert_eq!(of(Some(2..2)), (a, vec![]));
        let other = Reordered { inputs: None, ..delta.clone() };
        assert_ne!(other.form(), delta.form());
    }
}
