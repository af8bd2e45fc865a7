//! What methods work on: the updates of one module, or small matrices that stand for them in bases that they
//! share.

use super::dense::Dense;
use super::factored::Rows;
use crate::coefficients::Gram;
use crate::entrywise::{self, Finder, Mask, Room};
use crate::linalg::Matrix;
use crate::measure::spectrum::Update;

/// One module's updates.
pub(crate) struct Updates<'u, 'f> {
    /// What the module is called.
    pub name: &'u str,
    /// What random masks know it by.
    pub mask: &'u str,
    /// By adapter; `None` where one lacks the module.
    pub updates: &'u [Option<Update<'f>>],
    /// Those that are whole matrices, which are not among the updates; by adapter, or empty where there are
    /// none.
    pub dense: &'u [Option<Dense>],
    /// By adapter.
    pub weights: &'u [f64],
    /// (outputs, inputs).
    pub shape: [usize; 2],
    /// Of random masks.
    pub seed: u64,
}

/// How small matrices of one shape become one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Merge {
    /// A sum with coefficients from their inner products.
    Sum(Gram),
    /// Element by element.
    Entries(entrywise::Method),
}

impl Updates<'_, '_> {
    /// Whether some are whole matrices.
    pub fn has_dense(&self) -> bool {
        self.dense.iter().any(Option::is_some)
    }

    /// Whether an adapter changes the module.
    fn is_present(&self, adapter: usize) -> bool {
        self.updates[adapter].is_some() || self.dense.get(adapter).is_some_and(Option::is_some)
    }

    /// What an entry-wise method looks for in matrices of that shape, one for each update that there is.
    pub fn finder(&self, method: entrywise::Method, shape: [usize; 2]) -> Finder {
        let present = || (0..self.updates.len()).filter(|index| self.is_present(*index));
        let weights: Vec<f64> = present().map(|index| self.weights[index]).collect();
        let masks = present().map(|index| Mask::new(self.seed, self.mask, index)).collect();
        let missing = self.updates.len() - weights.len();
        Finder::new(method, shape, weights, masks, missing)
    }
}

impl Merge {
    /// One matrix of those that stand for the updates; `None` counts as zero.
    pub fn small(
        &self,
        of: &Updates<'_, '_>,
        [rows, columns]: [usize; 2],
        blocks: &[Option<Rows>],
    ) -> Rows {
        let mut result = Rows::zeros(rows, columns);
        match self {
            Self::Sum(gram) => {
                let coefficients = gram.coefficients_with(|| products(blocks), of.weights);
                for (block, coefficient) in blocks.iter().zip(coefficients) {
                    let Some(block) = block else { continue };
                    for (target, value) in result.values.iter_mut().zip(&block.values) {
                        *target += coefficient * value;
                    }
                }
            }
            Self::Entries(method) if rows * columns > 0 => {
                let narrow: Vec<Vec<f32>> = (blocks.iter().flatten())
                    .map(|block| block.values.iter().map(|value| *value as f32).collect())
                    .collect();
                let tile: Vec<&[f32]> = narrow.iter().map(Vec::as_slice).collect();
                let selection = of.finder(*method, [rows, columns]).of(&tile);
                let wide: Vec<&[f64]> =
                    blocks.iter().flatten().map(|block| &block.values[..]).collect();
                selection.merge(0, &tile, &wide, &mut Room::default(), &mut result.values);
            }
            Self::Entries(_) => {}
        }
        result
    }
}

fn products(blocks: &[Option<Rows>]) -> Matrix {
    let mut products = Matrix::zeros(blocks.len(), blocks.len());
    for (i, one) in blocks.iter().enumerate() {
        for (j, other) in blocks[..=i].iter().enumerate() {
            let (Some(one), Some(other)) = (one, other) else { continue };
            let sum = one.values.iter().zip(&other.values).map(|(x, y)| x * y).sum();
            products.set(i, j, sum);
            products.set(j, i, sum);
        }
    }
    products
}
