// Records what Knative's own autoscaler decides, as test data for tests/ops/test_knative.py.
//
// Reads scenarios (JSON) from standard input and writes them back with the decisions beside them. Once a second the
// load of that second is recorded, every two seconds Scale is asked, as Knative's collector and multiscaler do.
//
//	go mod init recorder && go get knative.dev/serving@v0.48.1 && go mod tidy && go run . < scenarios.json > decisions.json
package main

import (
	"encoding/json"
	"os"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric/noop"
	"go.uber.org/zap"
	"k8s.io/apimachinery/pkg/types"
	"knative.dev/serving/pkg/autoscaler/aggregation"
	"knative.dev/serving/pkg/autoscaler/metrics"
	"knative.dev/serving/pkg/autoscaler/scaling"
)

type windows interface {
	Record(time.Time, float64)
	WindowAverage(time.Time) float64
	IsEmpty(time.Time) bool
}

type load struct{ stable, panicking windows }

func (l load) averages(now time.Time) (float64, float64, error) {
	if l.stable.IsEmpty(now) {
		return 0, 0, metrics.ErrNoData
	}
	return l.stable.WindowAverage(now), l.panicking.WindowAverage(now), nil
}

func (l load) StableAndPanicConcurrency(_ types.NamespacedName, now time.Time) (float64, float64, error) {
	return l.averages(now)
}

func (l load) StableAndPanicRPS(_ types.NamespacedName, now time.Time) (float64, float64, error) {
	return l.averages(now)
}

type pods struct{ ready int }

func (p *pods) ReadyCount() (int, error)    { return p.ready, nil }
func (p *pods) NotReadyCount() (int, error) { return 0, nil }

type spec struct {
	Metric          string  `json:"metric"`
	Weighted        bool    `json:"weighted"`
	Target          float64 `json:"target"`
	Total           float64 `json:"total"`
	BurstCapacity   float64 `json:"target_burst_capacity"`
	PanicThreshold  float64 `json:"panic_threshold"`
	StableWindowS   float64 `json:"stable_window_s"`
	PanicWindowS    float64 `json:"panic_window_s"`
	ScaleDownDelayS float64 `json:"scale_down_delay_s"`
	MaxScaleUp      float64 `json:"max_scale_up_rate"`
	MaxScaleDown    float64 `json:"max_scale_down_rate"`
	ActivationScale int32   `json:"activation_scale"`
}

type scenario struct {
	Name      string     `json:"name"`
	Spec      spec       `json:"spec"`
	Load      []*float64 `json:"load"`
	Ready     []int      `json:"ready"`
	Decisions [][4]int32 `json:"decisions"`
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func main() {
	var scenarios []*scenario
	if err := json.NewDecoder(os.Stdin).Decode(&scenarios); err != nil {
		panic(err)
	}
	for _, s := range scenarios {
		var l load
		if s.Spec.Weighted {
			l = load{aggregation.NewWeightedFloat64Buckets(seconds(s.Spec.StableWindowS), time.Second),
				aggregation.NewWeightedFloat64Buckets(seconds(s.Spec.PanicWindowS), time.Second)}
		} else {
			l = load{aggregation.NewTimedFloat64Buckets(seconds(s.Spec.StableWindowS), time.Second),
				aggregation.NewTimedFloat64Buckets(seconds(s.Spec.PanicWindowS), time.Second)}
		}
		p := &pods{}
		scaler := scaling.New(attribute.NewSet(), noop.NewMeterProvider(), "ns", "rev", l, p, &scaling.DeciderSpec{
			MaxScaleUpRate: s.Spec.MaxScaleUp, MaxScaleDownRate: s.Spec.MaxScaleDown, ScalingMetric: s.Spec.Metric,
			TargetValue: s.Spec.Target, TotalValue: s.Spec.Total, TargetBurstCapacity: s.Spec.BurstCapacity,
			PanicThreshold: s.Spec.PanicThreshold, StableWindow: seconds(s.Spec.StableWindowS),
			ScaleDownDelay: seconds(s.Spec.ScaleDownDelayS), Reachable: true, ActivationScale: s.Spec.ActivationScale,
		})
		for i, value := range s.Load {
			now := time.Unix(1_800_000_000+int64(i), 0)
			if value != nil {
				l.stable.Record(now, *value)
				l.panicking.Record(now, *value)
			}
			p.ready = s.Ready[i]
			if i%2 == 0 {
				result := scaler.Scale(zap.NewNop().Sugar(), now)
				valid := int32(0)
				if result.ScaleValid {
					valid = 1
				}
				s.Decisions = append(s.Decisions, [4]int32{int32(i), result.DesiredPodCount, result.ExcessBurstCapacity, valid})
			}
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(scenarios); err != nil {
		panic(err)
	}
}
