//! The products of an expert's gate and of its upward matrix, whose rows lie in turn in one weight
//! (gpt-oss).

use std::ops::Range;
use std::sync::Arc;

use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::error::Result;
use crate::kernel::convert::widen_f64;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

/// The rows of two products of one shape in turn, of which one can be missing.
#[derive(Debug, Clone)]
pub struct Interleaved {
    /// The even rows.
    pub gate: Option<Arc<dyn Delta>>,
    /// The odd rows.
    pub up: Option<Arc<dyn Delta>>,
}

impl Interleaved {
    fn parts(&self) -> impl Iterator<Item = (usize, &Arc<dyn Delta>)> {
        let parts = [&self.gate, &self.up].into_iter().enumerate();
        parts.filter_map(|(place, delta)| Some((place, delta.as_ref()?)))
    }

    fn any(&self) -> &Arc<dyn Delta> {
        self.gate.as_ref().or(self.up.as_ref()).expect("at least one of the two")
    }
}

impl Delta for Interleaved {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        self.parts().flat_map(|(_, delta)| delta.tensors()).collect()
    }

    fn outputs(&self) -> u64 {
        self.any().outputs() * 2
    }

    fn input_shape(&self) -> Vec<u64> {
        self.any().input_shape()
    }

    fn rank(&self) -> u64 {
        self.parts().map(|(_, delta)| delta.rank()).sum()
    }

    fn form(&self) -> String {
        let form = |delta: &Option<Arc<dyn Delta>>| {
            delta.as_ref().map_or_else(|| "none".to_owned(), |delta| delta.form())
        };
        format!("Interleaved({}, {})", form(&self.gate), form(&self.up))
    }

    /// A of the one above that of the other; of B the rows in turn, each beside zeros.
    fn pair(&self, expert: Option<Expert>, outputs: Option<&Range<u64>>) -> Result<Pair> {
        let mut pairs = Vec::new();
        for (place, delta) in self.parts() {
            pairs.push((place, delta.pair(expert, None)?));
        }
        let rank: usize = pairs.iter().map(|(_, pair)| pair.rank).sum();
        let (height, inputs) = (pairs[0].1.outputs, pairs[0].1.inputs);
        let dtypes = |of: fn(&Pair) -> &Dtype| {
            let first = of(&pairs[0].1);
            let are_alike = pairs.iter().all(|(_, pair)| of(pair) == first);
            if are_alike { first.clone() } else { Dtype::F64 }
        };
        let (a_dtype, b_dtype) = (dtypes(|pair| &pair.a_dtype), dtypes(|pair| &pair.b_dtype));
        let size = b_dtype.size();
        let (mut a, mut b) = (Vec::new(), vec![0; height * 2 * rank * size]);
        let mut first = 0;
        for (place, pair) in pairs {
            a.extend(in_dtype(pair.a, &pair.a_dtype, &a_dtype));
            let own = in_dtype(pair.b, &pair.b_dtype, &b_dtype);
            let row = pair.rank * size;
            for (output, from) in own.chunks_exact(row).enumerate() {
                let start = ((output * 2 + place) * rank + first) * size;
                b[start..start + row].copy_from_slice(from);
            }
            first += pair.rank;
        }
        let pair = Pair { a, a_dtype, b, b_dtype, rank, outputs: height * 2, inputs };
        Ok(match outputs {
            Some(rows) => pair.outputs(rows.start as usize..rows.end as usize),
            None => pair,
        })
    }

    fn holds_experts(&self) -> bool {
        self.any().holds_experts()
    }

    fn is_of_layers(&self) -> bool {
        self.any().is_of_layers()
    }

    fn rows_in_turn(&self) -> Option<[Option<Arc<dyn Delta>>; 2]> {
        Some([self.gate.clone(), self.up.clone()])
    }

    fn is_exact(&self) -> bool {
        self.parts().all(|(_, delta)| delta.is_exact())
    }
}

/// Numbers in one type for both.
fn in_dtype(bytes: Vec<u8>, from: &Dtype, to: &Dtype) -> Vec<u8> {
    if from == to {
        return bytes;
    }
    widen_f64(from, &bytes).into_iter().flat_map(f64::to_le_bytes).collect()
}
