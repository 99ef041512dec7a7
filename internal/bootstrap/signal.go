package bootstrap

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/autoscaling"
	"github.com/aws/aws-sdk-go-v2/service/cloudformation"
	cloudformationtypes "github.com/aws/aws-sdk-go-v2/service/cloudformation/types"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/hearth-sh/hearth/api/v1alpha1"
	"github.com/hearth-sh/hearth/internal/bootstrap/fault"
)

// What can go wrong with telling others.
const (
	CodeSignalDenied fault.Code = "signal-denied"
	CodeSignalFailed fault.Code = "signal-failed"
)

// groupTag is where Auto Scaling writes an instance's group.
const groupTag = "aws:autoscaling:groupName"

// signalTimeout bounds telling one listener.
const signalTimeout = 20 * time.Second

// signalled says what a run has to tell: whether the instance may be used.
type signalled struct {
	Instance string
	Tags     map[string]string
	Success  bool
	Reason   string
}

// signal tells everybody the configuration names. It tries all.
func signal(ctx context.Context, config aws.Config, spec v1alpha1.SignalConfig, s signalled, note func(string, ...any)) error {
	var errs []error
	if spec.LifecycleHook != "" {
		group := cmp.Or(spec.AutoScalingGroup, s.Tags[groupTag])
		if group == "" {
			errs = append(errs, fault.New(CodeSignalFailed, nil,
				"set spec.signal.autoScalingGroup, or allow tags in the instance's metadata", "the lifecycle hook %s belongs to an unknown Auto Scaling group", spec.LifecycleHook))
		} else if err := completeLifecycle(ctx, config, group, spec.LifecycleHook, s); err != nil {
			errs = append(errs, err)
		} else {
			note("told the lifecycle hook %s of %s", spec.LifecycleHook, group)
		}
	}
	if c := spec.CloudFormation; c != nil {
		if err := signalStack(ctx, config, *c, s); err != nil {
			errs = append(errs, err)
		} else {
			note("told CloudFormation's %s of %s", c.Resource, c.Stack)
		}
	}
	return errors.Join(errs...)
}

// completeLifecycle ends the wait of a launch hook: CONTINUE puts the instance
// into service, ABANDON has it replaced.
func completeLifecycle(ctx context.Context, config aws.Config, group, hook string, s signalled) error {
	ctx, cancel := context.WithTimeout(ctx, signalTimeout)
	defer cancel()
	result := "CONTINUE"
	if !s.Success {
		result = "ABANDON"
	}
	_, err := autoscaling.NewFromConfig(config).CompleteLifecycleAction(ctx, &autoscaling.CompleteLifecycleActionInput{
		AutoScalingGroupName: &group, LifecycleHookName: &hook, InstanceId: &s.Instance, LifecycleActionResult: &result,
	})
	var api smithy.APIError
	if errors.As(err, &api) && api.ErrorCode() == "ValidationError" {
		// An instance that is in service has no action to complete: an
		// earlier run did it, or nobody waits.
		return nil
	}
	return classifyAWS(err, fmt.Sprintf("complete the lifecycle action %s of %s", hook, group), "autoscaling:CompleteLifecycleAction")
}

func signalStack(ctx context.Context, config aws.Config, c v1alpha1.CloudFormationSignal, s signalled) error {
	ctx, cancel := context.WithTimeout(ctx, signalTimeout)
	defer cancel()
	status := cloudformationtypes.ResourceSignalStatusSuccess
	if !s.Success {
		status = cloudformationtypes.ResourceSignalStatusFailure
	}
	_, err := cloudformation.NewFromConfig(config).SignalResource(ctx, &cloudformation.SignalResourceInput{
		StackName: &c.Stack, LogicalResourceId: &c.Resource, UniqueId: &s.Instance, Status: status,
	})
	return classifyAWS(err, fmt.Sprintf("signal %s of the stack %s", c.Resource, c.Stack), "cloudformation:SignalResource")
}

// classifyAWS tells what permission cures from what time may.
func classifyAWS(err error, what, action string) error {
	if err == nil {
		return nil
	}
	var api smithy.APIError
	if errors.As(err, &api) {
		switch api.ErrorCode() {
		case "AccessDenied", "AccessDeniedException", "UnauthorizedOperation":
			return fault.New(CodeSignalDenied, err, "allow "+action+" to the instance's role", "%s", what)
		}
		if ofCaller(err, api.ErrorCode()) {
			return fault.New(CodeSignalFailed, err, "see whether the names in spec.signal are right", "%s", what)
		}
	}
	return fault.Passing(CodeSignalFailed, err, "it is tried again", "%s", what)
}

// ofCaller says whether AWS blames the request. The status says so: of errors
// that the API's model does not name, such as ValidationError, the SDK knows no
// more.
func ofCaller(err error, code string) bool {
	for _, passes := range []string{"Throttl", "RequestLimitExceeded", "RequestTimeout", "Expired"} {
		if strings.Contains(code, passes) {
			return false
		}
	}
	var response *smithyhttp.ResponseError
	return errors.As(err, &response) && response.HTTPStatusCode()/100 == 4 && response.HTTPStatusCode() != http.StatusTooManyRequests
}
