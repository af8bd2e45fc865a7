//! The layouts in which trainers store the factors of several experts in one tensor each, told by
//! their shapes.

use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::Value;

use super::deltas::{Arranged, Experts, Factor, Interleaved, RowOrder, SharedReads};
use super::{Delta, LayerKind, Module, Parameter};
use crate::checkpoint::Checkpoint;
use crate::limits;
use crate::tensor::safetensors::Tensor;

/// A layout of the factors of several experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StackLayout {
    /// A [experts, rank, in] and B [experts, out, rank]; where one of them has one matrix, all
    /// experts share it (tinker, MLX, GGUF).
    Stacked,
    /// A [experts, in, rank] and B [experts, rank, out].
    Transposed,
    /// A [experts · rank, in], one expert after the other, and B [experts, out, rank] (early
    /// releases of MLX).
    FlatA,
    /// A [experts, rank, in] and B [out, rank · experts] with the expert as the fastest index of the
    /// columns (PEFT's `target_parameters` with A seen as what it is).
    FlatB,
}

/// What two shapes hold factors of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stack {
    /// The layout.
    pub layout: StackLayout,
    /// How many experts.
    pub count: u64,
    /// The rank of one product.
    pub rank: u64,
}

impl Stack {
    /// What two shapes are that are no pair of matrices and no convolution's; none, if they are.
    /// The rank is that of one product, where it is known.
    pub fn of(a: &[u64], b: &[u64], rank: Option<u64>) -> Option<Self> {
        let is_rank = |extent: u64| rank.is_none_or(|rank| rank == extent);
        let stack = |layout, count, rank| Some(Self { layout, count, rank });
        match (a, b) {
            // A convolution's.
            ([first, _, _], [_, rank, 1]) if first == rank && is_rank(*rank) => None,
            ([count, first, second], [other, third, fourth]) => {
                let alike = count == other || *count == 1 || *other == 1;
                let straight = first == fourth && is_rank(*first);
                let turned = second == third && is_rank(*second);
                // Of experts as wide as they are high, the rank is the smaller extent.
                let straight = straight && !(turned && second < first);
                match (straight, turned) {
                    _ if !alike => None,
                    (true, _) => stack(StackLayout::Stacked, *count.max(other), *first),
                    (_, true) => stack(StackLayout::Transposed, *count.max(other), *second),
                    _ => None,
                }
            }
            ([rows, _], [count, _, last])
                if count.checked_mul(*last) == Some(*rows) && is_rank(*last) =>
            {
                stack(StackLayout::FlatA, *count, *last)
            }
            ([count, first, _], [_, columns])
                if count.checked_mul(*first) == Some(*columns) && is_rank(*first) =>
            {
                stack(StackLayout::FlatB, *count, *first)
            }
            _ => None,
        }
    }

    /// The delta of two tensors of those shapes.
    ///
    /// # Errors
    /// In words, if there are more experts than a model has, or something is empty.
    pub fn delta(
        self,
        a: Tensor,
        b: Tensor,
        shared: &Arc<SharedReads>,
    ) -> Result<Arc<dyn Delta>, String> {
        let Self { layout, count, rank } = self;
        if a.elements() == 0 || b.elements() == 0 {
            return Err(format!(
                "{} of shape {:?} and {} of shape {:?} hold nothing",
                a.name, a.shape, b.name, b.shape
            ));
        }
        if rank > limits::RANK {
            return Err(format!("{} has rank {rank}; a rank is at most {}", a.name, limits::RANK));
        }
        if count > limits::EXPERTS {
            return Err(format!(
                "{} of shape {:?} holds the factors of {count} experts; there can be {}",
                a.name,
                a.shape,
                limits::EXPERTS
            ));
        }
        if layout == StackLayout::FlatB {
            let mut info = a.info().clone();
            info.shape = vec![count * rank, a.shape[2]];
            let a = Tensor::new(a.file().clone(), info);
            return Ok(Arc::new(Experts { a, b, shared: shared.clone() }));
        }
        let is_transposed = layout == StackLayout::Transposed;
        let factor = |tensor: Tensor| {
            let extents = match *tensor.shape {
                [_, rows, columns] if is_transposed => (columns, rows),
                [_, rows, columns] => (rows, columns),
                _ => (rank, tensor.shape[1]),
            };
            let is_shared = tensor.shape.len() == 3 && tensor.shape[0] == 1 && count > 1;
            Factor { tensor, extents, is_transposed, is_shared }
        };
        let (a, b) = (factor(a), factor(b));
        let (experts, order) = (Some(count), RowOrder::Straight);
        Ok(Arc::new(Arranged { a, b, experts, order, is_by_tokens: false }))
    }
}

/// The module that the factors of several experts make: their parameter is the last part of the
/// path, in the module before it.
pub fn module(key: String, path: &str, delta: Arc<dyn Delta>, rank: u64, scaling: f64) -> Module {
    let (parent, name) = path.rsplit_once('.').unwrap_or(("", path));
    Module {
        key,
        path: parent.to_owned(),
        parameters: vec![Parameter { name: name.to_owned(), rank, scaling }],
        kind: LayerKind::Linear,
        delta,
        scale: None,
        magnitude: None,
        bias: None,
        rank,
        alpha: scaling * rank as f64,
        scaling,
    }
}

/// Whether a base has the rows of gates and of upward matrices in turn in one weight; none where there is
/// no base to tell.
pub fn has_rows_in_turn(base: Option<&Checkpoint>) -> Option<bool> {
    let base = base?;
    let kind = base.config()?.get("model_type").and_then(Value::as_str);
    let is_fused = |name: &String| name.contains(".experts.gate_up_proj");
    Some(kind == Some("gpt_oss") && base.tensors().keys().any(is_fused))
}

/// The modules with those of gates and of upward matrices as the one weight in which gpt-oss has their
/// rows in turn.
///
/// # Errors
/// In words, if the two of one layer do not go together.
pub fn interleave(modules: IndexMap<String, Module>) -> Result<IndexMap<String, Module>, String> {
    let mut joined = IndexMap::<String, [Option<Module>; 2]>::new();
    let mut others = IndexMap::with_capacity(modules.len());
    for (key, module) in modules {
        let own = module.only_parameter().map(|parameter| parameter.name.as_str());
        let place = match own.filter(|_| module.delta.holds_experts()) {
            Some(name) if MATRICES[0].contains(&name) => 0,
            Some(name) if MATRICES[1].contains(&name) => 1,
            _ => {
                others.insert(key, module);
                continue;
            }
        };
        let path = module.path.clone();
        joined.entry(path).or_default()[place] = Some(module);
    }
    for (path, [gate, up]) in joined {
        if let (Some(gate), Some(up)) = (&gate, &up) {
            let shape =
                |module: &Module| (module.outputs(), module.inputs(), module.products().count());
            let is_one_scale =
                gate.scaling == up.scaling || gate.scaling.is_nan() && up.scaling.is_nan();
            if shape(gate) != shape(up) || !is_one_scale {
                return Err(format!(
                    "{} and {}, whose rows lie in turn in one weight, have not the same shape and \
                     scale",
                    gate.key, up.key
                ));
            }
        }
        let Some(first) = gate.as_ref().or(up.as_ref()) else { continue };
        let rank = [&gate, &up].into_iter().flatten().map(|module| module.rank).sum();
        let key = format!("{path}.{GATE_UP}");
        let scaling = first.scaling;
        let delta = |module: &Option<Module>| module.as_ref().map(|module| module.delta.clone());
        let delta = Arc::new(Interleaved { gate: delta(&gate), up: delta(&up) });
        others.insert(key.clone(), module(key.clone(), &key, delta, rank, scaling));
    }
    Ok(others)
}

/// Gate and upward matrix of a module in which their rows lie in turn, under these names; none where it
/// is no such module.
pub fn apart(module: &Module, names: [&str; 2]) -> Option<Vec<Module>> {
    let parts = module.delta.rows_in_turn()?.into_iter().zip(names);
    let count = module.products().count() as u64;
    let own = parts.filter_map(|(delta, name)| {
        let delta = delta?;
        let (key, rank) = (format!("{}.{name}", module.path), delta.rank() / count);
        Some(self::module(key.clone(), &key, delta, rank, module.scaling))
    });
    Some(own.collect())
}

/// What models call the one weight of both.
const GATE_UP: &str = "gate_up_proj";
/// What one matrix of an expert is called, by the three that it has: for the gate, upwards, and back.
const MATRICES: [[&str; 3]; 3] =
    [["gate_proj", "w1", "gate"], ["up_proj", "w3", "up"], ["down_proj", "w2", "down"]];

/// The names under which models have one matrix of an expert, its own first; none for what is no such
/// matrix.
pub fn names_of_matrix(name: &str) -> Vec<&str> {
    let known = MATRICES.iter().find(|names| names.contains(&name));
    let others = known.into_iter().flatten().copied().filter(|other| *other != name);
    known.is_some().then_some(name).into_iter().chain(others).collect()
}

/// Whether a matrix is the first or the second of those that models have in one weight; none for what is
/// neither.
pub fn slot_of_matrix(name: &str) -> Option<usize> {
    MATRICES[..2].iter().position(|names| names.contains(&name))
}

/// Whether a parameter of that name holds a matrix of each expert.
pub fn is_matrix(name: &str) -> bool {
    name == GATE_UP || !names_of_matrix(name).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_tell_experts_from_convolutions() {
        use StackLayout::{FlatA, FlatB, Stacked, Transposed};
        let found = |a: &[u64], b: &[u64], rank| {
            Stack::of(a, b, rank).map(|stack| (stack.count, stack.rank, stack.layout))
        };
        assert_eq!(found(&[8, 4, 20], &[8, 50, 4], Some(4)), Some((8, 4, Stacked)));
        assert_eq!(found(&[1, 4, 20], &[8, 50, 4], Some(4)), Some((8, 4, Stacked)));
        assert_eq!(found(&[8, 4, 20], &[1, 50, 4], None), Some((8, 4, Stacked)));
        assert_eq!(found(&[8, 20, 4], &[8, 4, 50], Some(4)), Some((8, 4, Transposed)));
        assert_eq!(found(&[32, 20], &[8, 50, 4], None), Some((8, 4, FlatA)));
        assert_eq!(found(&[8, 4, 20], &[50, 32], None), Some((8, 4, FlatB)));
        // As wide as they are high: the rank tells, or is the smaller.
        assert_eq!(found(&[8, 4, 20], &[8, 20, 4], None), Some((8, 4, Stacked)));
        assert_eq!(found(&[8, 20, 4], &[8, 4, 20], None), Some((8, 4, Transposed)));
        assert_eq!(found(&[8, 20, 4], &[8, 4, 20], Some(20)), Some((8, 20, Stacked)));
        // A kernel of three, of every rank and width.
        for (rank, inputs, outputs) in [(4, 20, 50), (4, 1, 4), (1, 1, 1), (4, 4, 4), (4, 1, 50)] {
            assert_eq!(found(&[rank, inputs, 3], &[outputs, rank, 1], Some(rank)), None);
            assert_eq!(found(&[rank, inputs, 3], &[outputs, rank, 1], None), None);
        }
        // Four experts of rank 1 with four outputs: only the rank tells.
        assert_eq!(found(&[4, 1, 20], &[4, 4, 1], Some(1)), Some((4, 1, Stacked)));
        for (a, b) in [
            (&[4, 20][..], &[50, 4][..]),
            (&[4, 20, 3, 3], &[50, 4, 1, 1]),
            (&[5, 4, 20], &[8, 50, 4]),
            (&[u64::MAX, 4, 2], &[5, 4]),
        ] {
            assert_eq!(found(a, b, None), None, "{a:?} {b:?}");
        }
        assert_eq!(found(&[8, 4, 20], &[8, 50, 4], Some(5)), None);
    }

    #[test]
    fn a_matrix_goes_by_the_names_of_all_models() {
        assert_eq!(names_of_matrix("w3"), ["w3", "up_proj", "up"]);
        assert!(names_of_matrix("gate_up_proj").is_empty());
    }
}
