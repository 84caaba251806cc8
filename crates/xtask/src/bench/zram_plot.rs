//! The picture of `bench zram --svg`: each row of spm's as a part of zram's, and how a phase change settles.

use plotters::prelude::*;

const WIDTH: u32 = 960;
/// Of each panel.
const HEIGHT: u32 = 260;
const SPM: RGBColor = RGBColor(0x2b, 0x6c, 0xb0);
const ZRAM: RGBColor = RGBColor(0x9a, 0xa5, 0xb1);
const GOAL: RGBColor = RGBColor(0xb7, 0x62, 0x1b);

/// One row of the table.
pub(super) struct Bar {
    pub(super) name: String,
    /// Of zram's.
    pub(super) rate: f64,
    /// Of zram's.
    pub(super) p99: f64,
}

/// Operations in each tenth of a second after a phase change, of one round.
pub(super) struct Course {
    pub(super) name: String,
    pub(super) kernel: Vec<u64>,
    pub(super) spm: Vec<u64>,
}

/// The text of an SVG file.
///
/// # Errors
/// The picture cannot be laid out.
pub(super) fn draw(title: &str, bars: &[Bar], goals: [f64; 2], courses: &[Course]) -> anyhow::Result<String> {
    let mut text = String::new();
    paint(&mut text, title, bars, goals, courses).map_err(|error| anyhow::anyhow!("the picture: {error}"))?;
    Ok(text)
}

type Painted<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn paint<'a>(
    to: &'a mut String,
    title: &str,
    bars: &[Bar],
    [rate_goal, p99_goal]: [f64; 2],
    courses: &[Course],
) -> Painted<'a> {
    let panels = 2 + courses.len();
    let area = SVGBackend::with_string(to, (WIDTH, HEIGHT * panels as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let parts = area.split_evenly((panels, 1));
    let heights =
        |pick: fn(&Bar) -> f64| bars.iter().map(|bar| (bar.name.as_str(), pick(bar))).collect::<Vec<_>>();
    let rate = format!("{title}: throughput of spm, of zram's (goal: at least {rate_goal})");
    paint_bars(&parts[0], &rate, &heights(|bar| bar.rate), rate_goal)?;
    let p99 = format!("p99 of a fault or request, of zram's (goal: at most {p99_goal})");
    paint_bars(&parts[1], &p99, &heights(|bar| bar.p99), p99_goal)?;
    for (part, course) in parts[2..].iter().zip(courses) {
        paint_course(part, course)?;
    }
    area.present()
}

type Panel<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn paint_bars<'a>(panel: &Panel<'a>, title: &str, bars: &[(&str, f64)], goal: f64) -> Painted<'a> {
    // One more than there are rows is drawn by none.
    let count = bars.len().max(1);
    let top =
        bars.iter().map(|bar| bar.1).filter(|height| height.is_finite()).fold(goal.max(1.0), f64::max) * 1.15;
    let mut chart = ChartBuilder::on(panel)
        .caption(title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(28)
        .y_label_area_size(48)
        .build_cartesian_2d((0..count - 1).into_segmented(), 0.0..top)?;
    let name = |at: &SegmentValue<usize>| match at {
        SegmentValue::CenterOf(index) => bars.get(*index).map_or(String::new(), |bar| bar.0.to_owned()),
        _ => String::new(),
    };
    chart.configure_mesh().disable_x_mesh().light_line_style(TRANSPARENT).x_label_formatter(&name).draw()?;
    chart.draw_series(bars.iter().enumerate().filter(|(_, bar)| bar.1.is_finite()).map(|(index, bar)| {
        let corners = [(SegmentValue::Exact(index), 0.0), (SegmentValue::Exact(index + 1), bar.1)];
        let mut rectangle = Rectangle::new(corners, SPM.filled());
        rectangle.set_margin(0, 0, 24, 24);
        rectangle
    }))?;
    chart.draw_series(bars.iter().enumerate().map(|(index, bar)| {
        let (label, at) =
            if bar.1.is_finite() { (format!("{:.2}", bar.1), bar.1) } else { ("no figure".into(), 0.0) };
        Text::new(label, (SegmentValue::CenterOf(index), at + top * 0.06), ("sans-serif", 13))
    }))?;
    for (at, colour) in [(1.0, ZRAM), (goal, GOAL)] {
        let ends = [(SegmentValue::Exact(0), at), (SegmentValue::Exact(count), at)];
        chart.draw_series(LineSeries::new(ends, colour.stroke_width(2)))?;
    }
    Ok(())
}

fn paint_course<'a>(panel: &Panel<'a>, course: &Course) -> Painted<'a> {
    let end = course.kernel.len().max(course.spm.len()).max(1) as f64 / 10.0;
    let rates = |slices: &[u64]| {
        let points = slices.iter().enumerate();
        points.map(|(index, count)| ((index as f64 + 0.5) / 10.0, *count as f64 / 100.0)).collect::<Vec<_>>()
    };
    let top = course.kernel.iter().chain(&course.spm).max().map_or(1.0, |most| *most as f64 / 100.0).max(1.0);
    let mut chart = ChartBuilder::on(panel)
        .caption(format!("{}: the hot set has just moved", course.name), ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(32)
        .y_label_area_size(48)
        .build_cartesian_2d(0.0..end, 0.0..top * 1.1)?;
    chart.configure_mesh().light_line_style(TRANSPARENT).x_desc("seconds").y_desc("thousand a second").draw()?;
    for (name, colour, slices) in [("kernel, zram", ZRAM, &course.kernel), ("spm", SPM, &course.spm)] {
        chart
            .draw_series(LineSeries::new(rates(slices), colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(ZRAM)
        .draw()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_rows_can_be_drawn_and_one_without_a_figure_says_so() {
        let bar = |rate| Bar { name: format!("row {rate}"), rate, p99: rate / 5.0 };
        let bars = [bar(0.5), bar(f64::NAN), bar(2.0)];
        let course = Course { name: "moving".into(), kernel: vec![], spm: vec![1, 50, 100] };
        for count in 0..=bars.len() {
            let text = draw("a <b>", &bars[..count], [1.5, 0.1], &[]).expect("a picture");
            assert_eq!(text.matches("no figure").count(), if count > 1 { 2 } else { 0 });
            assert_eq!(text.contains("row 0.5"), count > 0, "{text:.300}");
        }
        assert!(draw("a", &bars, [1.5, 0.1], &[course]).expect("a picture").contains("has just moved"));
    }
}
