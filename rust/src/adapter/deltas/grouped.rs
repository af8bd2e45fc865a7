//! Products of equal parts of a fused weight, of which some have factors.

use std::ops::Range;

use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::error::Result;
use crate::tensor::safetensors::Tensor;

/// A convolution in groups: A (n·r, in) and B (outputs of the n parts, r, 1) (PEFT's first
/// MergedLinear, `enable_lora`).
#[derive(Debug, Clone)]
pub struct Grouped {
    /// The first factors, one part after the other.
    pub a: Tensor,
    /// The second factors: the outputs of the parts that have some.
    pub b: Tensor,
    /// Which of the equal parts of the outputs have factors.
    pub enabled: Vec<bool>,
}

impl Delta for Grouped {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        vec![("the first factor", &self.a), ("the second factor", &self.b)]
    }

    fn outputs(&self) -> u64 {
        let enabled = self.enabled.iter().filter(|enabled| **enabled).count() as u64;
        self.b.shape[0] / enabled * self.enabled.len() as u64
    }

    fn changed_outputs(&self) -> Vec<Range<u64>> {
        let height = self.outputs() / self.enabled.len() as u64;
        let parts = self.enabled.iter().zip(0..).filter(|(enabled, _)| **enabled);
        let mut runs = Vec::<Range<u64>>::new();
        for (_, part) in parts {
            match runs.last_mut() {
                Some(last) if last.end == part * height => last.end += height,
                _ => runs.push(part * height..(part + 1) * height),
            }
        }
        runs
    }

    fn input_shape(&self) -> Vec<u64> {
        self.a.shape[1..].to_vec()
    }

    fn rank(&self) -> u64 {
        self.a.shape[0]
    }

    fn form(&self) -> String {
        format!("Parts({:?})", self.enabled)
    }

    /// B's rows of each group stand beside the group's own rows of A, at the outputs of the parts
    /// that have factors.
    fn pair(&self, _expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        let mut pair = Pair::stored(&self.a, &self.b, None)?;
        let size = pair.b_dtype.size();
        let (stored, width) = (self.b.shape[0] as usize, self.b.shape[1] as usize);
        pair.outputs = self.outputs() as usize;
        let groups = pair.rank / width;
        let height = pair.outputs / self.enabled.len();
        let enabled = self.enabled.iter().enumerate().filter(|(_, enabled)| **enabled);
        let starts: Vec<_> = enabled.map(|(part, _)| part * height).collect();
        let mut whole = vec![0; pair.outputs * pair.rank * size];
        for (row, from) in pair.b.chunks_exact(width * size).enumerate() {
            let output = starts[row / height] + row % height;
            let first = (output * pair.rank + row / (stored / groups) * width) * size;
            whole[first..first + from.len()].copy_from_slice(from);
        }
        pair.b = whole;
        Ok(match outputs {
            Some(rows) => pair.outputs(rows.start as usize..rows.end as usize),
            None => pair,
        })
    }

    fn is_exact(&self) -> bool {
        true
    }
}
