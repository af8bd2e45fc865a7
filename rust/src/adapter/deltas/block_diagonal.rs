//! A product of which one factor is block-diagonal, and stored without its zeros.

use std::ops::Range;

use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::error::Result;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

/// B·A with the blocks of one of the two below one another (PEFT's `use_bdlora`).
#[derive(Debug, Clone)]
pub struct BlockDiagonal {
    /// The first factor: (r, in), or (r, in/n) where it is the one that has blocks.
    pub a: Tensor,
    /// The second factor: (out, r), or (out, r/n) where it is the one that has blocks.
    pub b: Tensor,
    /// The number n of blocks.
    pub blocks: u64,
    /// Whether B is the one that has blocks.
    pub is_b: bool,
}

impl Delta for BlockDiagonal {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("the first factor", &self.a), ("the second factor", &self.b)]
    }

    fn outputs(&self) -> u64 {
        self.b.shape[0]
    }

    fn input_shape(&self) -> Vec<u64> {
        let stored = self.a.shape[1..].iter().product::<u64>();
        vec![if self.is_b { stored } else { stored * self.blocks }]
    }

    fn rank(&self) -> u64 {
        self.a.shape[0]
    }

    fn form(&self) -> String {
        format!("BlocksOf{}({})", if self.is_b { "B" } else { "A" }, self.blocks)
    }

    fn pair(&self, _expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        if !self.is_b {
            let mut pair = Pair::stored(&self.a, &self.b, outputs)?;
            pair.a = spread(&pair.a, &pair.a_dtype, self.blocks as usize, pair.rank);
            pair.inputs *= self.blocks as usize;
            return Ok(pair);
        }
        // Which columns a row of B has depends on its block.
        let mut pair = Pair::stored(&self.a, &self.b, None)?;
        pair.b = spread(&pair.b, &pair.b_dtype, self.blocks as usize, pair.outputs);
        Ok(match outputs {
            Some(rows) => pair.outputs(rows.start as usize..rows.end as usize),
            None => pair,
        })
    }

    fn is_exact(&self) -> bool {
        true
    }
}

/// A matrix of `rows` rows that are equal blocks below one another, with the blocks on its
/// diagonal.
fn spread(stored: &[u8], dtype: &Dtype, count: usize, rows: usize) -> Vec<u8> {
    let size = dtype.size();
    let width = stored.len() / size / rows;
    let mut whole = vec![0; rows * count * width * size];
    let lines = whole.chunks_exact_mut(count * width * size);
    for (row, (to, from)) in lines.zip(stored.chunks_exact(width * size)).enumerate() {
        let block = row / (rows / count);
        to[block * width * size..(block + 1) * width * size].copy_from_slice(from);
    }
    whole
}
