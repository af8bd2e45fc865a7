//! The products of all experts of one parameter, whose factors are stored together.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::error::Result;
use crate::tensor::safetensors::Tensor;

/// Whole tensors of which each of many products takes a part, the last ones that were asked for.
#[derive(Debug, Default)]
pub struct SharedReads(Mutex<VecDeque<(String, Arc<Vec<u8>>)>>);

/// How many of those are kept: the B of each of an expert's matrices, and one of the next layer's.
const KEPT: usize = 4;

impl SharedReads {
    /// All bytes of a tensor of which others will ask for as well. Whoever does meanwhile waits.
    fn read(&self, tensor: &Tensor) -> Result<Arc<Vec<u8>>> {
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = shared.iter().find(|(name, _)| *name == tensor.name) {
            return Ok(bytes.clone());
        }
        let bytes = Arc::new(tensor.read()?);
        if shared.len() == KEPT {
            shared.pop_front();
        }
        shared.push_back((tensor.name.clone(), bytes.clone()));
        Ok(bytes)
    }
}

/// A (E·r, in), one expert after the other: the rows e·r to (e+1)·r are expert e's. B (out, r·E) with
/// the expert as the fastest index of the columns: the columns k·E + e are its (PEFT's
/// `target_parameters`).
#[derive(Debug, Clone)]
pub struct Experts {
    /// The first factors.
    pub a: Tensor,
    /// The second factors.
    pub b: Tensor,
    /// The adapter's, for each expert reads all of B.
    pub shared: Arc<SharedReads>,
}

impl Delta for Experts {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("the first factor", &self.a), ("the second factor", &self.b)]
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
        "Experts".to_owned()
    }

    /// Of A the expert's rows, of B its columns, which lie apart. So B is read whole, and kept for
    /// the next expert. Without an expert, the factors as they are stored.
    fn pair(&self, expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        let Some(Expert { index, count }) = expert else {
            return Pair::stored(&self.a, &self.b, outputs);
        };
        let all = 0..self.outputs();
        let rows = outputs.unwrap_or(&all);
        let whole = self.shared.read(&self.b)?;
        let row = self.rank() as usize * self.b.dtype.size();
        self.part(
            Expert { index, count },
            &whole[rows.start as usize * row..rows.end as usize * row],
        )
    }

    /// Of B no more than those rows, of which nobody else asks.
    fn leading(&self, expert: Option<Expert>, rows: u64) -> Result<Pair> {
        let rows = 0..rows.min(self.outputs());
        match expert {
            Some(expert) => self.part(expert, &self.b.read_rows(self.rank(), &rows)?),
            None => Pair::stored(&self.a, &self.b, Some(&rows)),
        }
    }

    fn holds_experts(&self) -> bool {
        true
    }

    fn is_exact(&self) -> bool {
        true
    }
}

impl Experts {
    /// One expert's factors, by whole rows of B.
    fn part(&self, Expert { index, count }: Expert, rows: &[u8]) -> Result<Pair> {
        let (all_ranks, inputs) = (self.rank(), self.a.shape[1..].iter().product::<u64>());
        let rank = all_ranks / count;
        let size = self.b.dtype.size();
        let row = all_ranks as usize * size;
        let mut b = Vec::with_capacity(rows.len() / row * rank as usize * size);
        for row in rows.chunks_exact(row) {
            for k in 0..rank {
                let start = (k * count + index) as usize * size;
                b.extend_from_slice(&row[start..start + size]);
            }
        }
        Ok(Pair {
            a: self.a.read_rows(inputs, &(index * rank..(index + 1) * rank))?,
            a_dtype: self.a.dtype.clone(),
            b,
            b_dtype: self.b.dtype.clone(),
            rank: rank as usize,
            outputs: rows.len() / row,
            inputs: inputs as usize,
        })
    }
}
