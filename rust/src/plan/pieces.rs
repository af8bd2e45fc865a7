//! Updates of parameters that the base stores in pieces, or as a part of another tensor.

use std::ops::Range;

use super::naming::{Naming, Placing, Slice};
use super::planner::{Planner, refuse_quantized};
use super::targets::{self, ExpertLayout, Target};
use super::{Compat, Part, Update, UpdateKind};
use crate::adapter::{LayerKind, Module, Saved};
use crate::checkpoint::names::renames::Piece;
use crate::tensor::orientation::Orientation;

impl Planner<'_> {
    /// Adds the updates of a module whose parameter the base stores in pieces, or as a part of
    /// another; whether that is so.
    pub(super) fn update_in_pieces(
        &mut self,
        position: usize,
        (module, target): (&Module, &Target),
        naming: &Naming<'_>,
        weight: f64,
    ) -> Result<bool, String> {
        if !naming.is_renamed() {
            return Ok(false);
        }
        let placing = match naming.place(&target.parameter)? {
            None | Some(Placing::Whole(_)) => return Ok(false),
            Some(placing) => placing,
        };
        let path = &module.path;
        if module.kind != LayerKind::Linear {
            return Err(format!(
                "its module {path} is no linear layer, and the base stores its weight in pieces; \
                 merge with PEFT"
            ));
        }
        let kind = if module.magnitude.is_some() { UpdateKind::Dora } else { UpdateKind::LowRank };
        self.refuse_subtracting(path, kind)?;
        let adapter = &self.inputs.adapters[position];
        let repeats = adapter.semantics().layer_replication.is_some();
        if repeats && self.options.compat == Some(Compat::Peft) {
            return Err(format!(
                "its module {path} is in a layer that PEFT repeats, and the base stores its weight \
                 in pieces or as a part of another; leave compat out"
            ));
        }
        if self.residual(adapter, (module, target), None)?.is_some() {
            return Err(format!(
                "its module {path} began with components taken out of the base's weight \
                 (init_lora_weights, kasa_config), which the base stores in pieces or as a part of \
                 another; convert it in training"
            ));
        }
        let rank = module.product_rank(target.rank);
        let mut updates = self.place_product(position, (module, target), naming, &placing)?;
        for (_, part, _) in &mut updates {
            if !module.delta.holds_experts() {
                part.expert = None;
            }
        }
        let mut all: Vec<_> = updates
            .into_iter()
            .map(|(name, part, turned)| (name, kind, rank, part, turned))
            .collect();
        if module.bias.is_some() {
            let biases = self.place_bias(position, module, naming)?;
            let vector = |(name, part)| (name, UpdateKind::Vector, 1, part, false);
            all.extend(biases.into_iter().map(vector));
        }
        for (name, kind, rank, part, transposed) in all {
            let tensor = self.source(&name).expect("one of the base's");
            self.refuse_unreadable(path, &name)?;
            refuse_quantized(path, tensor)?;
            self.tensors.entry(name).or_default().updates.push(Update {
                adapter: position,
                module: module.key.clone(),
                kind,
                rank,
                scale: target.scale * targets::repeats(module),
                weight,
                transposed,
                part,
                on: None,
                residual: None,
                stage: 0,
            });
        }
        Ok(true)
    }

    /// Puts a saved parameter in the place of the pieces in which the base stores it, or of its part
    /// of a tensor; whether that is so.
    pub(super) fn replace_in_pieces(
        &mut self,
        position: usize,
        saved: &Saved,
        naming: &Naming<'_>,
        weight: f64,
    ) -> Result<bool, String> {
        if !naming.is_renamed() {
            return Ok(false);
        }
        let shape = &saved.tensor.shape;
        let rows_of =
            |shape: &[u64]| shape.split_last().map_or(0, |(_, rows)| rows.iter().product());
        let parts: Vec<(String, Range<u64>, Range<u64>)> = match naming.place(&saved.path)? {
            None | Some(Placing::Whole(_)) => return Ok(false),
            Some(Placing::Slices(slices)) => {
                let height = slices.iter().map(|slice| slice.rows.end).max().unwrap_or(0);
                let experts = slices.iter().filter_map(|slice| slice.expert).next();
                let rows = height * experts.map_or(1, |expert| expert.count);
                let own = if shape.len() == 1 { shape[0] } else { rows_of(shape) };
                if own != rows {
                    return Err(format!(
                        "its tensor {} of shape {shape:?} replaces what the base stores in {} \
                         pieces, {rows} rows in all ({} and others)",
                        saved.tensor.name,
                        slices.len(),
                        slices[0].tensor
                    ));
                }
                let place = |slice: Slice| {
                    let first = slice.expert.map_or(0, |expert| expert.index * height);
                    let (start, end) = (slice.rows.start, slice.rows.end);
                    (slice.tensor, first + start..first + end, 0..end - start)
                };
                slices.into_iter().map(place).collect()
            }
            Some(Placing::Band { tensor, piece }) => {
                let stored = &self.source(&tensor).expect("one of the base's").shape;
                let (first, height) = match (stored.as_slice(), piece.expert) {
                    (&[count, height, _], Some(expert)) if expert < count => {
                        (expert * height, height)
                    }
                    (&[height, ..], None) => (0, height),
                    _ => (0, 0),
                };
                let own = shape.first().copied().unwrap_or(0);
                let rows = self.slot(position, naming, &saved.path, &piece, height, own)?;
                vec![(tensor, 0..own, first + rows.start..first + rows.end)]
            }
        };
        for (name, from, to) in parts {
            let tensor = self.source(&name).expect("one of the base's");
            self.refuse_replacing(saved, &name)?;
            refuse_quantized(&saved.path, tensor)?;
            let stored = &tensor.shape;
            // Vectors have rows of one element.
            let (rows, width) = match shape.as_slice() {
                [length] => (*length, None),
                _ => (rows_of(shape), shape.last()),
            };
            let fits = match width {
                Some(width) => stored.len() > 1 && stored.last() == Some(width),
                None => stored.len() == 1,
            };
            let there = if stored.len() == 1 { stored[0] } else { rows_of(stored) };
            let within = from.end <= rows && to.end <= there;
            let floats = saved.tensor.dtype.is_mergeable();
            if !fits || !floats || !within || from.end - from.start != to.end - to.start {
                return Err(format!(
                    "its tensor {} of shape {shape:?} does not fit {name} of shape {stored:?}, where \
                     the base stores a part of it or it is a part",
                    saved.tensor.name
                ));
            }
            let change = self.tensors.entry(name.clone()).or_default();
            change.updates.push(Update {
                adapter: position,
                module: saved.tensor.name.clone(),
                kind: UpdateKind::Replace,
                rank: 0,
                scale: 1.0,
                weight,
                transposed: false,
                part: Part { outputs: Some(from), rows: Some(to), ..Part::default() },
                on: None,
                residual: None,
                stage: 0,
            });
        }
        Ok(true)
    }

    /// The tensors that a module's product goes to, with the part that each takes, and whether it
    /// lies turned there.
    fn place_product(
        &self,
        position: usize,
        (module, target): (&Module, &Target),
        naming: &Naming<'_>,
        placing: &Placing,
    ) -> Result<Vec<(String, Part, bool)>, String> {
        let (outputs, inputs) = (module.outputs(), module.inputs());
        match placing {
            Placing::Whole(name) => Ok(vec![(name.clone(), Part::default(), false)]),
            Placing::Slices(slices) => {
                let turned = target.layout == Some(ExpertLayout::Transposed);
                let rows = slices.iter().map(|slice| slice.rows.end).max().unwrap_or(0);
                let columns = self.columns(&slices[0].tensor);
                let extents = if turned { (inputs, outputs) } else { (outputs, inputs) };
                if extents != (rows, columns) {
                    return Err(misfit(module, &slices[0].tensor, (rows, columns)));
                }
                let placed = slices.iter().map(|slice| {
                    let cut = (slice.rows != (0..rows)).then(|| slice.rows.clone());
                    let (outputs, inputs) = if turned { (None, cut) } else { (cut, None) };
                    let part = Part { expert: slice.expert, outputs, inputs, rows: None };
                    (slice.tensor.clone(), part, turned)
                });
                Ok(placed.collect())
            }
            Placing::Band { tensor, piece } => {
                let (first, height, columns) = self.expert_of(tensor, piece, module)?;
                let band =
                    self.slot(position, naming, &target.parameter, piece, height, outputs)?;
                let rows = band.end - band.start;
                let orientation = if (outputs, inputs) == (rows, columns) {
                    Orientation::OutIn
                } else if piece.slots == 1 && (inputs, outputs) == (rows, columns) {
                    Orientation::InOut
                } else {
                    return Err(misfit(module, tensor, (rows, columns)));
                };
                let rows = Some(first + band.start..first + band.end);
                let part = Part { rows, ..Part::default() };
                Ok(vec![(tensor.clone(), part, orientation == Orientation::InOut)])
            }
        }
    }

    fn place_bias(
        &self,
        position: usize,
        module: &Module,
        naming: &Naming<'_>,
    ) -> Result<Vec<(String, Part)>, String> {
        let parameter = format!("{}.bias", module.path);
        let outputs = module.outputs();
        let placed = match naming.place(&parameter)? {
            None => Vec::new(),
            Some(Placing::Whole(name)) => vec![(name, Part::default())],
            Some(Placing::Slices(slices)) => {
                let end = slices.iter().map(|slice| slice.rows.end).max();
                let cut = |slice: Slice| {
                    let part = Part { outputs: Some(slice.rows), ..Part::default() };
                    (slice.tensor, part)
                };
                match end {
                    Some(end) if end == outputs => slices.into_iter().map(cut).collect(),
                    _ => Vec::new(),
                }
            }
            Some(Placing::Band { tensor, piece }) => {
                let height = self.source(&tensor).map_or(0, |tensor| tensor.shape[0]);
                let rows = self.slot(position, naming, &parameter, &piece, height, outputs)?;
                vec![(tensor, Part { rows: Some(rows), ..Part::default() })]
            }
        };
        let fits = |(name, part): &(String, Part)| {
            let shape = &self.source(name).expect("one of the base's").shape;
            shape.len() == 1 && (!part.is_whole() || shape[0] == outputs)
        };
        if placed.is_empty() || !placed.iter().all(fits) {
            return Err(format!(
                "its module {} has a bias on lora_B, but the base has no {parameter} of its size",
                module.path
            ));
        }
        Ok(placed)
    }

    /// The number of inputs of a stored matrix.
    fn columns(&self, tensor: &str) -> u64 {
        let shape = self.source(tensor).map_or(&[][..], |tensor| &tensor.shape);
        shape.iter().skip(1).product()
    }

    /// Where the matrix of a piece's expert begins in a stored tensor, and its rows and columns.
    fn expert_of(
        &self,
        tensor: &str,
        piece: &Piece,
        module: &Module,
    ) -> Result<(u64, u64, u64), String> {
        let shape = self.source(tensor).map_or(&[][..], |tensor| &tensor.shape);
        match (shape, piece.expert) {
            (&[height, width], None) => Ok((0, height, width)),
            (&[count, height, width], Some(expert)) if expert < count => {
                Ok((expert * height, height, width))
            }
            _ => Err(format!(
                "its module {} is a part of {tensor}, which has shape {shape:?} in the base",
                module.path
            )),
        }
    }

    /// The rows of one of several matrices that lie below one another.
    fn slot(
        &self,
        position: usize,
        naming: &Naming<'_>,
        parameter: &str,
        piece: &Piece,
        height: u64,
        outputs: u64,
    ) -> Result<Range<u64>, String> {
        let slots = piece.slots as u64;
        let slot = piece.slot as u64;
        if slots == 1 {
            return Ok(0..height);
        }
        if piece.equal || outputs * slots == height {
            return Ok(slot * height / slots..(slot + 1) * height / slots);
        }
        // Parts of several sizes: the adapter's own modules have them, if it has all of them.
        let heights = naming.own_heights(&self.inputs.adapters[position], parameter, piece.slots);
        match heights.into_iter().collect::<Option<Vec<_>>>() {
            Some(heights) if heights.iter().sum::<u64>() == height => {
                let start = heights[..piece.slot].iter().sum::<u64>();
                Ok(start..start + heights[piece.slot])
            }
            _ => Err(format!(
                "its {parameter} is one of {slots} parts of {height} rows in the base, and nothing \
                 tells the sizes of the others; merge with PEFT"
            )),
        }
    }
}

fn misfit(module: &Module, tensor: &str, (rows, columns): (u64, u64)) -> String {
    format!(
        "its module {} updates a weight of shape [{}, {}], but in the base, where it belongs to \
         {tensor}, it has shape [{rows}, {columns}]",
        module.path,
        module.outputs(),
        module.inputs()
    )
}

#[cfg(test)]
mod tests;
