//! Trained rows of embeddings (`trainable_token_indices`): bands of a tensor that are replaced.

use super::naming::Naming;
use super::planner::{Planner, refuse_quantized};
use super::restoring::GIVE_THE_BASE;
use super::{Part, Update, UpdateKind};
use crate::adapter::TrainedRows;

impl Planner<'_> {
    /// Puts an adapter's rows in the place of the base's.
    pub(super) fn replace_rows(
        &mut self,
        position: usize,
        rows: &TrainedRows,
        naming: &Naming<'_>,
        weight: f64,
    ) -> Result<(), String> {
        let path = &rows.path;
        if self.options.subtract {
            return Err(format!(
                "its tensor {} stands in the place of rows of the base's {path}, which are in \
                 neither the merged model nor the adapter; {GIVE_THE_BASE}",
                rows.tensor.name
            ));
        }
        let parameter = format!("{path}.weight");
        let name = naming.apply(&parameter)?.unwrap_or(parameter);
        let name = self.name_in_tie(&name).unwrap_or(name);
        let Some(tensor) = self.source(&name) else {
            return Err(format!("its module {path} fits no tensor of the base"));
        };
        self.refuse_unreadable(path, &name)?;
        refuse_quantized(path, tensor)?;
        // An adapter's own tensor in the base's place may have another number of rows.
        let origin = self.tensors.get(&name).and_then(|change| change.origin.as_ref());
        let shape = match origin {
            Some((owner, source)) if *owner == position => &source.shape,
            Some((_, source)) if source.shape != tensor.shape => {
                return Err(format!(
                    "its tensor {} replaces rows of {name}, of which an earlier adapter changed the \
                     number of tokens; merge the one, and this one into what comes of it",
                    rows.tensor.name
                ));
            }
            _ => &tensor.shape,
        };
        let width = rows.tensor.shape[1];
        if shape.len() != 2 || shape[1] != width {
            return Err(format!(
                "its tensor {} of shape {:?} replaces rows of {name}, which has shape {shape:?}",
                rows.tensor.name, rows.tensor.shape
            ));
        }
        if let Some(row) = rows.rows.iter().find(|row| **row >= shape[0]) {
            return Err(format!(
                "its config trains the token {row} (trainable_token_indices), but {name} has \
                 {} rows",
                shape[0]
            ));
        }
        for name in self.rows_replaced_by(position, &name) {
            self.put_rows(position, rows, name, weight);
        }
        Ok(())
    }

    fn put_rows(&mut self, position: usize, rows: &TrainedRows, name: String, weight: f64) {
        let change = self.tensors.entry(name.clone()).or_default();
        change.updates.extend(runs(&rows.rows).into_iter().map(|(first, start, count)| Update {
            adapter: position,
            module: rows.tensor.name.clone(),
            kind: UpdateKind::Replace,
            rank: 0,
            scale: 1.0,
            weight,
            transposed: false,
            part: Part {
                expert: None,
                outputs: Some(first..first + count),
                inputs: None,
                rows: Some(start..start + count),
            },
            on: None,
            residual: None,
            stage: 0,
        }));
    }
}

/// Rows that follow one another: their position in the adapter's tensor, the first of them, and
/// how many they are.
fn runs(rows: &[u64]) -> Vec<(u64, u64, u64)> {
    let mut runs: Vec<(u64, u64, u64)> = Vec::new();
    for (position, row) in rows.iter().enumerate() {
        match runs.last_mut() {
            Some((_, start, count)) if *start + *count == *row => *count += 1,
            _ => runs.push((position as u64, *row, 1)),
        }
    }
    runs
}
